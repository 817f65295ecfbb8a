"""Fewer experts per token: the router's k, lowered at once or in turn with a recovery."""

from __future__ import annotations

from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.passes import LayerEdit
from moejax.core import SpecError, check_that, spec
from moejax.models import Block, DecoderLM, ModelSpec, choosing, layers, with_layers
from moejax.moe import MoESpec, RankedSelector


@spec
class ChooseFewer:
    """Every router chooses `k` experts per token instead of more (SEER-MoE, arXiv:2404.05089).

    No weight changes: compute per token goes, memory stays. k is annealed by a recipe that lowers
    it step by step with a `Recover` after each. The ledger gets no rows.
    SpecError where a layer chooses fewer than k already, or does not choose by rank.
    """

    k: int

    def check(self) -> None:
        check_that(self.k >= 1, self, "k", "Choose at least one expert per token.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks = layers(model)
        if not model.spec.moe_layers:
            raise SpecError("ChooseFewer: the model has no experts.", "Choose a MoE model.")
        for index in model.spec.moe_layers:
            self._check(index, blocks[index])
            blocks[index] = choosing(blocks[index], self.k)
        return with_layers(model, blocks), ()

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: tokens go to fewer experts."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> None:
        return None

    def apply_layer(
        self, index: int, block: Block, plan: None, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        return LayerEdit(block if block.moe is None else choosing(block, self.k))

    def _check(self, index: int, block: Block) -> None:
        assert isinstance(block.spec.ffn, MoESpec)
        selector = block.spec.ffn.router.selector
        if not isinstance(selector, RankedSelector):
            raise SpecError(
                f"ChooseFewer: layer {index} has {type(selector).__name__}, which has no k.",
                "Lower k of routers that choose the k best.",
            )
        if self.k > selector.k:
            raise SpecError(
                f"ChooseFewer.k = {self.k}, but the router of layer {index} chooses {selector.k}.",
                f"Give 1 to {selector.k}.",
                field="k",
            )
