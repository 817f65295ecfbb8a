"""Manifests of earlier versions, brought to what this one writes: JSON in, JSON out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Data = dict[str, Any]

VERSION = 2
"""Of the manifests written now. 2: norms and rotary positions are specs of their own."""


def migrated(manifest: Data) -> Data:
    """The manifest as VERSION; of version 1 or later, no newer than this, or left as it is."""
    for version in range(manifest["version"], VERSION):
        spec = _MIGRATIONS[version](manifest["spec"])
        manifest = {**manifest, "version": version + 1, "spec": spec}
    return manifest


def _from_1(spec: Data) -> Data:
    """ModelSpec.norm_epsilon, AttentionSpec.rope_base and .qk_norm (a flag) become specs."""
    spec = dict(spec)
    norm = {"type": "RMSNorm", "epsilon": spec.pop("norm_epsilon", 1e-5)}

    def mixer(old: Any) -> Any:
        if not isinstance(old, dict) or old.get("type") != "AttentionSpec":
            return old
        new = dict(old)
        new["rope"] = {"type": "Rope", "base": new.pop("rope_base", 10_000.0)}
        whole = {"type": "ProjectionNorm", "norm": norm}
        new["qk_norm"] = whole if new.pop("qk_norm", False) else None
        return new

    def layer(old: Any) -> Any:
        return {**old, "mixer": mixer(old.get("mixer"))} if isinstance(old, dict) else old

    layers = spec.get("layers")
    if isinstance(layers, list):
        spec["layers"] = [layer(one) for one in layers]
    return {**spec, "norm": norm}


_MIGRATIONS: dict[int, Callable[[Data], Data]] = {1: _from_1}
