"""Experts dropped wherever in the model they count least (arXiv:2406.02500, arXiv:2404.05089)."""

from __future__ import annotations

import math

import numpy as np

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
class GlobalExpertDrop(DropsExperts):
    """Keeps the experts of highest score in the whole model, the lower index first among equals.

    fraction: the share of all experts that goes, rounded to whole experts (halves up). Every layer
    keeps `floor` experts, and as many as its router chooses. Scores are compared between layers:
    counts, masses and probabilities of one text are alike in all of them.
    SpecError where the floors together are above what may stay.
    """

    fraction: float
    score: ExpertScore
    floor: int = 1

    def check(self) -> None:
        fix = "Give a share from 0 (keep all) to below 1."
        check_that(0 <= self.fraction < 1, self, "fraction", fix)
        check_that(self.floor >= 1, self, "floor", "Every layer keeps at least one expert.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        """As even as it can be: which layers keep more, only scores tell."""
        room, kept = self._experts(model.spec), self._floors(model.spec)
        for _ in range(self._kept(model.spec) - sum(kept.values())):
            fewest = min((i for i in kept if kept[i] < room[i]), key=lambda i: kept[i])
            kept[fewest] += 1
        return outlined(model, kept)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks, floors = layers(model), self._floors(model.spec)
        scores = {i: scores_of(self.score, i, blocks[i], stats) for i in floors}
        plan = {i: set(best(scores[i], floor)) for i, floor in floors.items()}
        rest = [(i, e) for i, score_E in scores.items() for e in range(len(score_E))]
        rest = [(i, e) for i, e in rest if e not in plan[i]]
        order = np.argsort([-scores[i][e] for i, e in rest], kind="stable")
        for place in order[: self._kept(model.spec) - sum(floors.values())]:
            layer, expert = rest[place]
            plan[layer].add(expert)
        return {layer: tuple(sorted(experts)) for layer, experts in plan.items()}

    def _experts(self, model: ModelSpec) -> dict[int, int]:
        found = {i: routed_part(model.layers[i]).experts for i in model.moe_layers}
        check_that(len(found) > 0, self, "score", "The model has no layer with experts to drop.")
        return found

    def _floors(self, model: ModelSpec) -> dict[int, int]:
        floors = {}
        for layer, experts in self._experts(model).items():
            least = chosen_per_token(routed_part(model.layers[layer]))
            floors[layer] = min(experts, max(self.floor, least))
        if sum(floors.values()) > self._kept(model):
            most = 1 - sum(floors.values()) / sum(self._experts(model).values())
            raise SpecError(
                f"GlobalExpertDrop.fraction = {self.fraction} leaves {self._kept(model)} experts, "
                f"but the {len(floors)} layers keep at least {sum(floors.values())}: "
                f"{dict(floors)} by their routers' k and floor = {self.floor}.",
                f"Drop at most {most:g}.",
                field="fraction",
            )
        return floors

    def _kept(self, model: ModelSpec) -> int:
        total = sum(self._experts(model).values())
        return total - math.floor(self.fraction * total + 0.5)
