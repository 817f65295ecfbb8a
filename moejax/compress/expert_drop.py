"""Removal of whole experts with their router rows (expert drop, arXiv:2406.02500)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import expert_matrices
from moejax.compress.expert_scores import ExpertScore
from moejax.compress.passes import LayerEdit, MatrixEdit
from moejax.core import SpecError, check_that, spec
from moejax.models import (
    Block,
    DecoderLM,
    LayerSpec,
    ModelSpec,
    layers,
    select_experts,
    with_layers,
)
from moejax.moe import MoESpec
from moejax.runs.ledger import DROPPED

Plan = dict[int, tuple[int, ...]]  # layer -> experts that stay, ascending


class DropsExperts:
    """What passes share that drop experts as planned, one layer at a time."""

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: indices change, and tokens go to other experts."""
        return True

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        return with_experts(block, plan[index]) if index in plan else LayerEdit(block)


@spec
class ExpertDrop(DropsExperts):
    """Keeps the experts of highest score in every layer, the lower index first among equals.

    fraction: the share of a layer's experts that goes, rounded to whole experts (halves up); one
    number for all layers, or one per layer with experts. The router loses the rows of what goes, so
    that it chooses its k among the rest. SpecError where fewer than k experts would be left.
    With `Frequency` it is the pruning of SEER-MoE (arXiv:2404.05089), with `MeanProbability` the
    layer-wise expert drop of arXiv:2406.02500.
    """

    fraction: float | tuple[float, ...]
    score: ExpertScore

    def check(self) -> None:
        """Shares in [0, 1)."""
        shares = self.fraction if isinstance(self.fraction, tuple) else (self.fraction,)
        fits = all(0 <= share < 1 for share in shares)
        check_that(fits, self, "fraction", "Give shares from 0 (keep all) to below 1.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        return outlined(model, self._kept(model.spec))

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks = layers(model)
        return {
            layer: best(scores_of(self.score, layer, blocks[layer], stats), kept)
            for layer, kept in self._kept(model.spec).items()
        }

    def _kept(self, model: ModelSpec) -> dict[int, int]:
        """Layer with experts -> how many of them stay."""
        found, shares = model.moe_layers, self.fraction
        if not isinstance(shares, tuple):
            shares = (shares,) * len(found)
        fix = f"Give one number, or one for each of the {len(found)} layers with experts."
        check_that(0 < len(shares) == len(found), self, "fraction", fix)
        return {
            layer: kept_experts(self, share, routed_part(model.layers[layer]), layer)
            for layer, share in zip(found, shares, strict=True)
        }


def outlined(model: DecoderLM, kept: Mapping[int, int]) -> tuple[DecoderLM, tuple[str, ...]]:
    """A model of shapes whose layers keep so many experts, and the names of their matrices."""
    blocks, names = layers(model), []
    for layer, count in kept.items():
        names += [f"layers.{layer}.{name}" for name in expert_matrices(blocks[layer])]
        first = functools.partial(select_experts, keep=range(count))
        blocks[layer] = nnx.eval_shape(first, blocks[layer])
    return with_layers(model, blocks), tuple(names)


def with_experts(block: Block, keep: tuple[int, ...]) -> LayerEdit:
    """A block that keeps some of its experts, and a row for each that it had."""
    edits = tuple(
        MatrixEdit(name, expert, relative_error=0.0)
        if expert in keep
        else MatrixEdit(name, expert, lineage=(DROPPED,))
        for name in expert_matrices(block)
        for expert in range(routed_part(block.spec).experts)
    )
    return LayerEdit(select_experts(block, keep), edits, experts=keep)


def scores_of(score: ExpertScore, layer: int, block: Block, stats: Statistics) -> np.ndarray:
    """float64 [E]; SpecError where the score is no number per expert."""
    experts = routed_part(block.spec).experts
    score_E = np.asarray(score(layer, block, stats.layers[layer]), np.float64)
    if score_E.shape != (experts,) or np.isnan(score_E).any():
        raise SpecError(
            f"{score} gives layer {layer} the scores {score_E.tolist()}.",
            f"A score is one number for each of {experts} experts.",
            field="score",
        )
    return score_E


def best(score_E: np.ndarray, count: int) -> tuple[int, ...]:
    """The experts of highest score, ascending; the lower index first among equals."""
    return tuple(sorted(np.argsort(-score_E, kind="stable")[:count].tolist()))


def chosen_per_token(moe: MoESpec) -> int:
    """The k of a layer's router: fewer experts it cannot have."""
    return getattr(moe.router.selector, "k", 1)


def kept_experts(owner: object, share: float, moe: MoESpec, layer: int) -> int:
    """How many experts stay in a layer that loses `share` of them; SpecError if too few do.

    owner: the pass whose field `fraction` says so.
    """
    kept = moe.experts - math.floor(share * moe.experts + 0.5)
    least = chosen_per_token(moe)
    if kept < least:
        most = moe.experts - least
        raise SpecError(
            f"{type(owner).__name__}.fraction = {share} leaves {kept} of {moe.experts} experts in "
            f"layer {layer}, but its router chooses k = {least}.",
            f"Drop at most {most} of them: a fraction of {most / moe.experts:g}.",
            field="fraction",
        )
    return kept


def routed_part(layer: LayerSpec) -> MoESpec:
    """The routed feed-forward of a layer that has one."""
    assert isinstance(layer.ffn, MoESpec)
    return layer.ffn
