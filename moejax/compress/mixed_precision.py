"""Experts of one layer at different precisions (MC-MoE's PMQ, arXiv:2410.06270; EdgeMoE; MoQa)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.allocation import Allocation, Plan
from moejax.compress.block_weights import (
    block_weights,
    expert_matrices,
    with_block_weights,
)
from moejax.compress.methods import (
    Choice,
    Method,
    RoundToNearest,
    edits,
)
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight, require_dense
from moejax.core import SpecError, check_that, spec
from moejax.models import Block, DecoderLM, ModelSpec, layers, permute_experts, with_layers


@spec
class MixedPrecision:
    """Gives every expert one of `grids`, as `allocation` decides, all three matrices alike.

    Experts are reordered, router rows with them, so that those of one grid lie side by side
    (`weights.Buckets`); the function of the layer does not depend on their order. `FullPrecision()`
    among the grids leaves an expert in bfloat16.
    SpecError where experts lie behind a slot map, are quantized already, or a grid does not fit.
    """

    grids: tuple[Choice, ...]
    allocation: Allocation
    method: Method = RoundToNearest()

    def check(self) -> None:
        check_that(len(self.grids) > 0, self, "grids", "Give the grids to choose from.")
        distinct = len(set(self.grids)) == len(self.grids)
        check_that(distinct, self, "grids", "Name each grid once.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks, names = layers(model), []
        for index, choice in self.allocation.outline(model.spec, self.grids).items():
            matrices = expert_matrices(blocks[index])
            names += [f"layers.{index}.{matrix}" for matrix in matrices]
            blocks[index] = self._shapes(blocks[index], index, choice)
        return with_layers(model, blocks), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.allocation.needs(self.grids)

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        matrices = ("moe.experts.gate", "moe.experts.up", "moe.experts.down")
        return tuple(dict.fromkeys(a for matrix in matrices for a in self.method.needs(matrix)))

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: other weights, and another order of experts."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        return self.allocation.decide(stats, model, self.grids)

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        choice_E = np.asarray(plan[index])
        order = np.argsort(choice_E, kind="stable")
        named = block_weights(block)
        changed: dict[str, Weight] = {}
        rows: list[MatrixEdit] = []
        for matrix in expert_matrices(block):
            name = f"layers.{index}.{matrix}"
            require_dense(named[matrix], name)
            inputs = self.method.inputs(matrix, stats)
            parts: list[Weight] = []
            for i in np.unique(choice_E):
                experts = np.flatnonzero(choice_E == i)
                # All experts, and some are kept: one program per grid, not one per bucket size.
                found = self.method(named[matrix], self.grids[i], inputs, name).take(experts)
                parts.append(_part(found.weight, len(experts) < len(choice_E)))
                rows += edits(matrix, found, experts)
            changed[matrix] = parts[0] if len(parts) == 1 else weights.Buckets(tuple(parts))
        kept = tuple(order.tolist())
        if kept == tuple(range(len(kept))):
            return LayerEdit(with_block_weights(block, changed), tuple(rows))
        permuted = permute_experts(block, kept)
        return LayerEdit(with_block_weights(permuted, changed), tuple(rows), experts=kept)

    def _shapes(self, block: Block, index: int, choice: tuple[int, ...]) -> Block:
        named = block_weights(block)
        changed: dict[str, Weight] = {}
        for matrix in expert_matrices(block):
            name, w = f"layers.{index}.{matrix}", named[matrix]
            require_dense(w, name)
            if w.shape[0] != len(choice):
                raise SpecError(
                    f"{name} holds {w.shape[0]} stored experts for {len(choice)} of the router's.",
                    "Choose precisions before experts are merged or replicated.",
                )
            self.method.needs(matrix)
            parts = []
            for i, count in zip(*np.unique(choice, return_counts=True), strict=True):
                some = jax.ShapeDtypeStruct((int(count), *w.shape[1:]), w.dtype)
                grid = functools.partial(self.grids[int(i)], name=name)
                shapes = jax.eval_shape(grid, some)
                parts.append(_part(shapes, count < len(choice)))
            changed[matrix] = parts[0] if len(parts) == 1 else weights.Buckets(tuple(parts))
        return with_block_weights(block, changed)


def _part(weight: Weight, in_buckets: bool) -> Weight:
    """A plain part of Buckets is stored as it is, and so in bfloat16."""
    if not in_buckets or isinstance(weight, weights.Format):
        return weight
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16)
    return weight.astype(jnp.bfloat16)
