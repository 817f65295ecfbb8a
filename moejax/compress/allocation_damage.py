"""Grids by the loss that they cause, measured on real text (EdgeMoE, arXiv:2308.14352)."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax import models, weights
from moejax.calibrate import Accumulator, Statistics
from moejax.compress.allocation import Grids, Plan, stored_experts
from moejax.compress.block_weights import block_weights, expert_matrices, with_block_weights
from moejax.compress.methods import Choice, FullPrecision
from moejax.compress.text_windows import spread
from moejax.core import MoejaxError, check_that, spec
from moejax.data import EvalBatch
from moejax.models import DecoderLM, ModelSpec, layers, with_layers

Banks = tuple[dict[int, dict[str, Any]], ...]  # per grid: layer -> matrix -> experts on that grid


@spec
class DamageBudget:
    """As few bits as keep the loss on the calibration text within `tolerance` of the model's own.

    First each expert goes to the lowest grid alone; the loss that this adds is its importance.
    Then all experts go down through the grids together, while the tolerance allows. Between the
    last width that it allows and the first that it does not, experts are `lower`ed one at a time,
    least important first, until it would be broken; or all are lowered and the most important
    `raise`d again until it holds. So the plan never breaks the tolerance on that text, and takes no
    more bits than any grid for all experts that keeps it. Experts are rounded to nearest.

    tolerance: relative, 0.05 lets the mean negative log-likelihood grow by 5 %.
    windows: how many windows of the calibration text are read, spread evenly over it; each expert
    takes about two passes over them.
    The paper does not say how it ends its search; this follows its description from either end.
    """

    tolerance: float
    direction: Literal["lower", "raise"] = "lower"
    windows: int = 8

    def check(self) -> None:
        check_that(self.tolerance >= 0, self, "tolerance", "0.05 lets the loss grow by 5 %.")
        check_that(self.windows >= 1, self, "windows", "Read at least one window.")

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        return ()

    def outline(self, model: ModelSpec, grids: Grids) -> Plan:
        """All experts on the grid of middle bits."""
        middle = _downwards(grids)[(len(grids) - 1) // 2]
        return {layer: (middle,) * stored for layer, stored in stored_experts(model).items()}

    def decide(self, stats: Statistics, model: DecoderLM, grids: Grids) -> Plan:
        stored = stored_experts(model.spec)
        experts = [(layer, e) for layer, count in stored.items() for e in range(count)]
        increase = _Increase(model, grids, spread(stats.text, self.windows, "DamageBudget"))
        down = _downwards(grids)
        importance = [increase({expert: down[-1]}) for expert in experts]
        order = [experts[i] for i in np.argsort(importance, kind="stable")]

        def uniform(grid: int) -> dict[tuple[int, int], int]:
            return dict.fromkeys(experts, grid)

        level = 0
        if not increase(uniform(down[0])) <= self.tolerance:
            raise MoejaxError(
                f"DamageBudget.tolerance = {self.tolerance:g} is broken with all experts at "
                f"{grids[down[0]].bits} bits: the loss grows by {increase(uniform(down[0])):.2%}.",
                "Raise the tolerance, or add a grid of more bits, or FullPrecision().",
            )
        for deeper in range(1, len(down)):
            if increase(uniform(down[deeper])) <= self.tolerance:
                level = deeper
        found = uniform(down[level])
        if level + 1 < len(down):
            found = self._between(order, down[level], down[level + 1], increase)
        return {
            layer: tuple(found[layer, e] for e in range(count)) for layer, count in stored.items()
        }

    def _between(
        self, order: list[tuple[int, int]], high: int, low: int, increase: _Increase
    ) -> dict[tuple[int, int], int]:
        """Experts on two grids: the least important low, by how many the tolerance allows."""

        def lowered(count: int) -> dict[tuple[int, int], int]:
            return {expert: low if i < count else high for i, expert in enumerate(order)}

        def holds(count: int) -> bool:
            return bool(increase(lowered(count)) <= self.tolerance)

        if self.direction == "lower":
            broken = (n for n in range(1, len(order)) if not holds(n))
            return lowered(next(broken, len(order)) - 1)
        kept = (n for n in range(len(order) - 1, 0, -1) if holds(n))
        return lowered(next(kept, 0))


class _Increase:
    """Relative increase of the loss when some experts, and no others, are on grids."""

    def __init__(self, model: DecoderLM, grids: Grids, text: list[EvalBatch]):
        self.model, self.text = model, text
        self.banks = tuple(_bank(model, grid) for grid in grids)
        self.full = {
            layer: np.full(stored, -1, np.int32)
            for layer, stored in stored_experts(model.spec).items()
        }
        self.base = self.loss({})

    def __call__(self, choice: dict[tuple[int, int], int]) -> float:
        return (self.loss(choice) - self.base) / self.base

    def loss(self, choice: dict[tuple[int, int], int]) -> float:
        """Mean negative log-likelihood of the text, nats per token. choice: (layer, e) -> grid."""
        chosen = {layer: choice_E.copy() for layer, choice_E in self.full.items()}
        for (layer, e), grid in choice.items():
            chosen[layer][e] = grid
        graphdef, state = nnx.split(self.model)
        sums = [
            _nll(graphdef, state, self.banks, chosen, b.tokens_BxS, b.targets_BxS, b.mask_BxS)
            for b in self.text
        ]
        return float(sum(sums)) / sum(int(b.mask_BxS.sum()) for b in self.text)


def _bank(model: DecoderLM, grid: Choice) -> dict[int, dict[str, Any]]:
    """The experts of every layer on one grid; nothing for full precision."""
    if isinstance(grid, FullPrecision):
        return {}
    bank = {}
    for layer, block in enumerate(layers(model)):
        named = block_weights(block)
        bank[layer] = {
            m: grid(weights.materialize(named[m]), f"layers.{layer}.{m}")
            for m in expert_matrices(block)
        }
    return bank


@functools.partial(jax.jit, static_argnames="graphdef")
def _nll(
    graphdef: Any,
    state: Any,
    banks: Banks,
    choice: dict[int, Array],
    tokens_BxS: Array,
    targets_BxS: Array,
    mask_BxS: Array,
) -> Array:
    """Sum of -log p(target); choice: layer -> grid of each expert, -1 for none. One program."""
    model = nnx.merge(graphdef, state)
    blocks = layers(model)
    for layer, choice_E in choice.items():
        named, changed = block_weights(blocks[layer]), {}
        for matrix in expert_matrices(blocks[layer]):
            w_ExKxN = weights.materialize(named[matrix])
            for grid, bank in enumerate(banks):
                if layer in bank:
                    near_ExKxN = weights.materialize(bank[layer][matrix])
                    w_ExKxN = jnp.where((choice_E == grid)[:, None, None], near_ExKxN, w_ExKxN)
            changed[matrix] = w_ExKxN
        blocks[layer] = with_block_weights(blocks[layer], changed)
    output = models.forward(with_layers(model, blocks), tokens_BxS, mask_BxS=mask_BxS)
    log_p_BxSxV = jax.nn.log_softmax(output.logits_BxSxV, axis=-1)
    nll_BxS = -jnp.take_along_axis(log_p_BxSxV, targets_BxS[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask_BxS, nll_BxS, 0))


def _downwards(grids: Grids) -> list[int]:
    """Indices of the grids, most bits first."""
    return sorted(range(len(grids)), key=lambda i: -grids[i].bits)
