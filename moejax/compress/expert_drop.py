"""Removal of whole experts with their router rows (expert drop, arXiv:2406.02500)."""

from __future__ import annotations

import functools
import math

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


@spec
class ExpertDrop:
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
        blocks, names = layers(model), []
        for layer, share in self._shares(model.spec).items():
            first = range(_kept(layer, share, model.spec))
            names += [f"layers.{layer}.{name}" for name in expert_matrices(blocks[layer])]
            blocks[layer] = nnx.eval_shape(
                functools.partial(select_experts, keep=first), blocks[layer]
            )
        return with_layers(model, blocks), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: indices change, and tokens go to other experts."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks = layers(model)
        return {
            layer: self._best(
                layer, _kept(layer, share, model.spec), blocks[layer], stats.layers[layer]
            )
            for layer, share in self._shares(model.spec).items()
        }

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        keep = plan[index]
        edits = tuple(
            MatrixEdit(name, expert, relative_error=0.0)
            if expert in keep
            else MatrixEdit(name, expert, lineage=(DROPPED,))
            for name in expert_matrices(block)
            for expert in range(_moe(block.spec).experts)
        )
        return LayerEdit(select_experts(block, keep), edits, experts=keep)

    def _shares(self, model: ModelSpec) -> dict[int, float]:
        """Layer with experts -> the share of them that goes."""
        found, shares = model.moe_layers, self.fraction
        if not isinstance(shares, tuple):
            shares = (shares,) * len(found)
        fix = f"Give one number, or one for each of the {len(found)} layers with experts."
        check_that(0 < len(shares) == len(found), self, "fraction", fix)
        return dict(zip(found, shares, strict=True))

    def _best(self, layer: int, kept: int, block: Block, stats: LayerStatistics) -> tuple[int, ...]:
        experts = _moe(block.spec).experts
        score_E = np.asarray(self.score(layer, block, stats), np.float64)
        if score_E.shape != (experts,) or np.isnan(score_E).any():
            raise SpecError(
                f"{self.score} gives layer {layer} the scores {score_E.tolist()}.",
                f"A score is one number for each of {experts} experts.",
                field="score",
            )
        best = np.argsort(-score_E, kind="stable")[:kept]
        return tuple(sorted(best.tolist()))


def _kept(layer: int, share: float, model: ModelSpec) -> int:
    """How many experts stay in a layer that loses `share` of them."""
    moe = _moe(model.layers[layer])
    kept = moe.experts - math.floor(share * moe.experts + 0.5)
    least = getattr(moe.router.selector, "k", 1)
    if kept < least:
        most = moe.experts - least
        raise SpecError(
            f"ExpertDrop.fraction = {share} leaves {kept} of {moe.experts} experts in layer "
            f"{layer}, but its router chooses k = {least}.",
            f"Drop at most {most} of them: a fraction of {most / moe.experts:g}.",
            field="fraction",
        )
    return kept


def _moe(layer: LayerSpec) -> MoESpec:
    assert isinstance(layer.ffn, MoESpec)
    return layer.ffn
