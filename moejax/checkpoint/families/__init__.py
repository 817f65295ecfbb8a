"""Families of models that come in and go out, one file each; each file defines FAMILY.

A new family is a new file: it is found by being here. `checkpoint/family.py` says what it holds.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from moejax.checkpoint.family import Family
from moejax.core import CheckpointError


@functools.cache
def families() -> dict[str, Family]:
    """Every family by model_type."""
    found: dict[str, Family] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        family: Family = importlib.import_module(f"{__name__}.{module}").FAMILY
        for model_type in family.model_types:
            assert model_type not in found, f"two families have the model_type {model_type}"
            found[model_type] = family
    return found


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a config, by its model_type or, where it is that of another, its class.

    Raises CheckpointError for a model_type no family has, with those that there are. A config with
    remote code (auto_map) is read like any other if its model_type is known here; the code is
    never run.
    """
    model_type, classes = config.get("model_type"), config.get("architectures")
    for family in families().values():
        if isinstance(classes, list) and any(name in classes for name in family.classes):
            return family
    if isinstance(model_type, str) and model_type in families():
        return families()[model_type]
    known = f"moejax knows {', '.join(sorted(families()))}."
    if config.get("auto_map"):
        raise CheckpointError(
            f"{where} has model_type {model_type!r} and code of its own (auto_map), which moejax "
            "never runs.",
            known,
        )
    raise CheckpointError(f"{where} has the unsupported model_type {model_type!r}.", known)
