"""Trainable floats and the rest, split before gradient and optimizer see anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import compat
from moejax.models.decoder import DecoderLM

Leaves = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a partition forgets: graph, tree, and the name of every leaf. Hashable, for jit."""

    graphdef: Any
    tree: Any
    names: tuple[str, ...]


def partition(
    model: DecoderLM, trains: Callable[[str], bool] = lambda name: True
) -> tuple[Structure, Leaves, Leaves]:
    """(structure, trainable, frozen): leaves by name, each in exactly one of the two.

    Trainable are plain float parameters and the leaves a format declares trainable, as far as
    `trains(name)` agrees to the leaf, such as `runs.0.moe.experts.up.terms[1].u`; codes, zeros,
    tables and router state are frozen.
    """
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    names, floats = [], []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(str(part) for part in path)
        value = compat.read(variable)
        suffixes = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(value)[0]
        ]
        names += [name + suffix for suffix in suffixes]
        floats += [
            flag and isinstance(variable, nnx.Param) and trains(name + suffix)
            for flag, suffix in zip(_float_leaves(value), suffixes, strict=True)
        ]
    assert len(names) == len(leaves) == len(set(names))
    parts = list(zip(names, leaves, floats, strict=True))
    trainable = {name: leaf for name, leaf, flag in parts if flag}
    frozen = {name: leaf for name, leaf, flag in parts if not flag}
    return Structure(graphdef, tree, tuple(names)), trainable, frozen


def combine(structure: Structure, trainable: Leaves, frozen: Leaves) -> DecoderLM:
    """The model of which `partition` made these parts."""
    together = {**frozen, **trainable}
    state = jax.tree.unflatten(structure.tree, [together[name] for name in structure.names])
    return nnx.merge(structure.graphdef, state)


def _float_leaves(value: Any) -> list[bool]:
    """One flag per leaf, in tree order: a plain float array, or a leaf its format lets train."""
    if not isinstance(value, weights.Format):
        return [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(value)]
    flags = []
    for field in dataclasses.fields(value):
        if field.name in value.meta_fields:
            continue
        held = getattr(value, field.name)
        for part in held if isinstance(held, tuple) else (held,):
            inner = _float_leaves(part)
            flags += inner if field.name in value.trainable else [False] * len(inner)
    return flags
