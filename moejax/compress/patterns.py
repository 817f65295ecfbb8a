"""Which parameters a pass means: globs over canonical names."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from fnmatch import fnmatchcase

import jax

from moejax import weights
from moejax.core import SpecError
from moejax.models import ModelSpec, abstract_model, parameters

BIAS = "bias"
"""What names of biases end in: [N], or [E, N] in a bank of experts."""

GUARDED = ("router", "norm", "embed", "head", "shared_gate", "sinks", BIAS)
"""Words of names that a `*` does not stand for: a glob means such parameters only if it says so."""

OUTSIDE = -1
"""The layer number of weights outside the layers, in plans and in the ledger."""


def matching(owner: str, pattern: str, model: ModelSpec) -> tuple[str, ...]:
    """The matrices of a model that a glob names; `*` runs over dots too.

    owner: the field that holds the glob, for errors. Raises SpecError when it names nothing,
    listing the nearest names, or a vector such as the scale of a norm.
    """
    shapes = parameter_shapes(model)
    found = tuple(name for name in shapes if fnmatchcase(name, pattern) and _meant(name, pattern))
    if not found:
        near = difflib.get_close_matches(pattern, shapes, n=3, cutoff=0.0)
        raise SpecError(
            f"{owner} = {pattern!r} names no parameter.",
            f"The nearest are {', '.join(near)}; `*` stands for any part of a name, but "
            f"{', '.join(GUARDED)} must be spelled out.",
            field="parameters",
        )
    for name in found:
        if len(shapes[name]) < 2 or name.endswith(BIAS):
            raise SpecError(
                f"{owner} = {pattern!r} names {name}, a vector of shape {list(shapes[name])}.",
                "Vectors stay as they are: choose a glob that names matrices only.",
                field="parameters",
            )
    return found


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight; tables such as slot maps are left out."""
    named = parameters(abstract_model(model))
    kinds = (jax.ShapeDtypeStruct, jax.Array, weights.Format)
    return {name: tuple(w.shape) for name, w in named.items() if isinstance(w, kinds)}


def in_layer(name: str) -> tuple[int, str]:
    """ "layers.3.moe.experts.up" -> (3, "moe.experts.up"); (OUTSIDE, name) for any other name."""
    if not name.startswith("layers."):
        return OUTSIDE, name
    _, index, rest = name.split(".", 2)
    return int(index), rest


def by_layer(names: Iterable[str]) -> dict[int, tuple[str, ...]]:
    """Layer, or OUTSIDE, -> the names within it, in their order."""
    found: dict[int, tuple[str, ...]] = {}
    for name in names:
        layer, within = in_layer(name)
        found[layer] = (*found.get(layer, ()), within)
    return found


def _meant(name: str, pattern: str) -> bool:
    return all(word in pattern for word in GUARDED if word in name)
