"""How a bank of experts, in any format, is cut over a mesh and brought together again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from moejax import weights
from moejax.core import SpecError, compat
from moejax.core.axes import EXPERT_HIDDEN
from moejax.mesh import MODEL
from moejax.moe.experts import BANK_LOGICAL, GatedExperts
from moejax.moe.parallel.strategy import Parallel

Cut = tuple[tuple[str, ...], ...]  # for each axis of a leaf, the mesh axes that it is cut over


def cuts(experts: GatedExperts, parallel: Parallel) -> list[Cut]:
    """How each leaf of the bank, in tree order, is cut by the mesh's rules.

    Raises SpecError where the mesh does not cut experts, hidden units or a format's groups evenly.
    """
    sizes = parallel.mesh.shape
    found: list[Cut] = []
    for name, weight in _held(experts).items():
        axes = weights.logical_axes(weight, BANK_LOGICAL[name])
        for leaf, array in weights.flatten(weight).items():
            found.append(parallel.rules.cut(array.shape, axes[leaf], sizes))
    if sizes[MODEL] > 1:
        _check_hidden(experts, sizes[MODEL])
    return found


def spec_of(cut: Cut) -> P:
    """The PartitionSpec of a cut."""
    return P(*(part or None for part in cut))


def only(cut: Cut, axes: tuple[str, ...]) -> Cut:
    """The cut along these mesh axes alone."""
    return tuple(tuple(axis for axis in part if axis in axes) for part in cut)


def brought(leaf: Any, cut: Cut, axes: tuple[str, ...]) -> Any:
    """Inside shard_map: the leaf whole along `axes`; its gradient is reduced and scattered."""
    for dimension, part in enumerate(only(cut, axes)):
        if len(part) < 2:
            for axis in part:
                leaf = lax.all_gather(leaf, axis, axis=dimension, tiled=True)
            continue
        # Slow links first, so that each part crosses them once for all devices behind them.
        for axis in part:
            leaf = lax.all_gather(leaf, axis, axis=dimension, tiled=False)
        lead = list(range(dimension, dimension + len(part)))
        leaf = jnp.moveaxis(leaf, lead, lead[::-1])
        shape = leaf.shape
        joined = math.prod(shape[dimension : dimension + len(part) + 1])
        leaf = leaf.reshape(*shape[:dimension], joined, *shape[dimension + len(part) + 1 :])
    return leaf


def device_order(experts: GatedExperts, devices: int) -> np.ndarray:
    """int [E]: the stored experts as the devices hold them, those of the first device first.

    The identity but for `Buckets`, of which every device holds its part of each bucket.
    Raises SpecError where the matrices of the bank do not have the same buckets.
    """
    sections = {
        name: _sections(weight) for name, weight in _held(experts).items() if "bias" not in name
    }
    first = sections["gate"]
    for name, sizes in sections.items():
        if sizes != first and devices > 1:
            raise SpecError(
                f"the experts' gate has buckets of {first}, their {name} of {sizes}: a mesh would "
                "tear experts apart.",
                "Give all three matrices the same buckets, or use MeshSpec.expert = 1.",
            )
    starts = np.cumsum([0, *first[:-1]])
    return np.concatenate(
        [
            np.arange(start + d * size // devices, start + (d + 1) * size // devices)
            for d in range(devices)
            for start, size in zip(starts, first, strict=True)
        ]
    )


def biases_in(order_E: np.ndarray, experts: GatedExperts) -> GatedExperts:
    """The bank with its biases in the order in which devices hold the experts."""
    if np.array_equal(order_E, np.arange(order_E.size)) or experts.gate_bias is None:
        return experts
    moved = compat.copied(experts)
    for bias in (moved.gate_bias, moved.up_bias, moved.down_bias):
        if bias is not None:
            compat.write(bias, jnp.take(compat.read(bias), order_E, axis=0))
    return moved


def one_down_bias(experts: GatedExperts) -> GatedExperts:
    """Inside shard_map: the output bias on the first device along `model`, zero on the others."""
    if experts.down_bias is not None:
        bias = compat.read(experts.down_bias)
        first = lax.axis_index(MODEL) == 0
        compat.write(experts.down_bias, jnp.where(first, bias, jnp.zeros_like(bias)))
    return experts


def count(sizes: Mapping[str, int], axes: tuple[str, ...]) -> int:
    """How many devices there are along `axes`."""
    return math.prod(sizes[axis] for axis in axes)


def _held(experts: GatedExperts) -> dict[str, Any]:
    """Name -> weight, in the order of the bank's leaves."""
    _, state = nnx.split(experts)
    return {str(path[-1]): compat.read(v) for path, v in nnx.to_flat_state(state)}


def _sections(weight: Any) -> tuple[int, ...]:
    """Experts of each part of a weight that is cut by itself."""
    match weight:
        case weights.Buckets():
            return weight.sizes
        case weights.Sum():
            parts = weight.terms
        case weights.LowRank():
            parts = (weight.u, weight.v)
        case weights.SharedBase():
            parts = (weight.residual,)
        case weights.Transposed():
            parts = (weight.of,)
        case _:
            return (weight.shape[0],)
    kinds = {_sections(part) for part in parts}
    if len(kinds) > 1:
        name, found = type(weight).__name__, " and of ".join(map(str, sorted(kinds)))
        raise SpecError(
            f"a {name} has parts with buckets of {found}.",
            f"Put each {name} in Buckets, not Buckets in a {name}, to run it on a mesh.",
        )
    return kinds.pop()


def _has_row_patch(weight: Any) -> bool:
    parts = jax.tree.leaves(weight, is_leaf=lambda part: isinstance(part, weights.RowPatch))
    return any(isinstance(part, weights.RowPatch) for part in parts)


def _check_hidden(experts: GatedExperts, parts: int) -> None:
    if experts.activation.gate_blocks > 1:
        raise SpecError(
            f"MeshSpec.model = {parts} cannot cut experts whose gate has "
            f"{experts.activation.gate_blocks} blocks of hidden units side by side.",
            "Use MeshSpec.model = 1 for this activation.",
            field="model",
        )
    for name, weight in _held(experts).items():
        if not isinstance(weight, weights.Format):
            continue
        axes = weights.logical_axes(weight, BANK_LOGICAL[name])
        local = [
            jax.ShapeDtypeStruct(
                tuple(
                    n // parts if axis == EXPERT_HIDDEN else n
                    for n, axis in zip(array.shape, axes[leaf], strict=True)
                ),
                array.dtype,
            )
            for leaf, array in weights.flatten(weight).items()
        ]
        if BANK_LOGICAL[name][-2] == EXPERT_HIDDEN and _has_row_patch(weight):
            raise SpecError(
                f"MeshSpec.model = {parts} cuts the experts' {name} across its rows, whose exact "
                "copies a RowPatch names by number.",
                "Use MeshSpec.model = 1, or materialize the patch.",
                field="model",
            )
        part = jax.tree.structure(weight).unflatten(local)
        expected = tuple(
            n // parts if axis == EXPERT_HIDDEN else n
            for n, axis in zip(weight.shape, BANK_LOGICAL[name], strict=True)
        )
        if part.shape != expected:
            # Summed over `model`, an expert that is whole on every device would count that often.
            raise SpecError(
                f"MeshSpec.model = {parts} cannot cut the experts' {name}, whose format does not "
                "say which of its values belong to which hidden unit.",
                "Use MeshSpec.model = 1, and MeshSpec.expert or fsdp in its place.",
                field="model",
            )
        try:
            part.check()
        except SpecError as error:
            raise SpecError(
                f"MeshSpec.model = {parts} cuts the experts' {name} where its format cannot be "
                f"cut: {error.problem}",
                "Choose fewer parts, or smaller groups.",
                field="model",
            ) from error
