"""Experts dropped that fall short of their layer's mean (TSEP, arXiv:2206.00277)."""

from __future__ import annotations

from moejax.calibrate import Accumulator, Statistics
from moejax.compress.expert_drop import (
    DropsExperts,
    Plan,
    best,
    chosen_per_token,
    outlined,
    routed_part,
    scores_of,
)
from moejax.compress.expert_scores import ExpertScore
from moejax.core import SpecError, check_that, spec
from moejax.models import DecoderLM, ModelSpec, layers


@spec
class BelowMeanDrop(DropsExperts):
    """Drops the experts whose score is below `share` of the mean score of their layer.

    TSEP (arXiv:2206.00277) drops so, at the end of each window of fine-tuning, with a share that
    rises from window to window; a recipe of `Recover` and this in turn does it. Every layer keeps
    as many as its router chooses, the best. How many go, only statistics tell: the plan shows none.
    """

    share: float
    score: ExpertScore

    def check(self) -> None:
        check_that(self.share > 0, self, "share", "1 drops all below the mean.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        if not model.spec.moe_layers:
            raise SpecError("BelowMeanDrop: the model has no experts.", "Choose a MoE model.")
        room = {i: routed_part(model.spec.layers[i]).experts for i in model.spec.moe_layers}
        return outlined(model, room)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks, plan = layers(model), {}
        for index in model.spec.moe_layers:
            score_E = scores_of(self.score, index, blocks[index], stats)
            enough = int((score_E >= self.share * score_E.mean()).sum())
            least = chosen_per_token(routed_part(model.spec.layers[index]))
            plan[index] = best(score_E, max(enough, least))
        return plan
