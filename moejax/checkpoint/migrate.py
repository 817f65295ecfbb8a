"""Manifests of earlier versions, brought to what this one writes: JSON in, JSON out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moejax.core import CheckpointError

Data = dict[str, Any]

VERSION = 2
"""Of the manifests written now. 2: norms and rotary positions are specs of their own; codes of 3,
5, 6 and 7 bits stay within a byte lane of words (moejax_kernels.quantized_grouped_matmul)."""


def migrated(manifest: Data) -> Data:
    """The manifest as VERSION; of version 1 or later, no newer than this, or left as it is.

    Raises CheckpointError where version 1 packed codes as no version since does.
    """
    if manifest["version"] == 1:
        for name, meta in manifest.get("parameters", {}).items():
            if bits := _old_codes(meta):
                raise CheckpointError(
                    f"{name} has codes of {bits} bits as manifests of version 1 pack them.",
                    "Make the compressed model anew: its config is in its run folder.",
                )
    for version in range(manifest["version"], VERSION):
        spec = _MIGRATIONS[version](manifest["spec"])
        manifest = {**manifest, "version": version + 1, "spec": spec}
    return manifest


def _old_codes(meta: Any) -> int:
    """Bits of codes, in a weight's description, that lie in another order now; 0 for none."""
    if not isinstance(meta, dict):
        return 0
    inner = meta.get("meta")
    bits = inner.get("bits") if isinstance(inner, dict) else None
    if isinstance(bits, int) and 8 % max(bits, 1):
        return bits
    leaves = meta.get("leaves")
    return max(map(_old_codes, leaves.values()), default=0) if isinstance(leaves, dict) else 0


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
