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


class DropsAnywhere(DropsExperts):
    """What passes share that drop `fraction` of all experts, and leave `floor` in every layer."""

    fraction: float
    floor: int

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        """As even as it can be: which layers keep more, only statistics tell."""
        room, kept = self._experts(model.spec), self.floors(model.spec)
        for _ in range(self.kept(model.spec) - sum(kept.values())):
            fewest = min((i for i in kept if kept[i] < room[i]), key=lambda i: kept[i])
            kept[fewest] += 1
        return outlined(model, kept)

    def _experts(self, model: ModelSpec) -> dict[int, int]:
        found = {i: routed_part(model.layers[i]).experts for i in model.moe_layers}
        check_that(len(found) > 0, self, "fraction", "The model has no experts to drop.")
        return found

    def floors(self, model: ModelSpec) -> dict[int, int]:
        floors = {}
        for layer, experts in self._experts(model).items():
            least = chosen_per_token(routed_part(model.layers[layer]))
            floors[layer] = min(experts, max(self.floor, least))
        if sum(floors.values()) > self.kept(model):
            most = 1 - sum(floors.values()) / sum(self._experts(model).values())
            raise SpecError(
                f"{type(self).__name__}.fraction = {self.fraction} leaves {self.kept(model)} "
                f"experts, but the {len(floors)} layers keep at least {sum(floors.values())}: "
                f"{dict(floors)} by their routers' k and floor = {self.floor}.",
                f"Drop at most {most:g}.",
                field="fraction",
            )
        return floors

    def kept(self, model: ModelSpec) -> int:
        total = sum(self._experts(model).values())
        return total - math.floor(self.fraction * total + 0.5)


def check_shares(drop: DropsAnywhere) -> None:
    """Raises SpecError for a share or a floor that no model has."""
    fix = "Give a share from 0 (keep all) to below 1."
    check_that(0 <= drop.fraction < 1, drop, "fraction", fix)
    check_that(drop.floor >= 1, drop, "floor", "Every layer keeps at least one expert.")


@spec
class GlobalExpertDrop(DropsAnywhere):
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
        check_shares(self)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks, floors = layers(model), self.floors(model.spec)
        scores = {i: scores_of(self.score, i, blocks[i], stats) for i in floors}
        plan = {i: set(best(scores[i], floor)) for i, floor in floors.items()}
        rest = [(i, e) for i, score_E in scores.items() for e in range(len(score_E))]
        rest = [(i, e) for i, e in rest if e not in plan[i]]
        order = np.argsort([-scores[i][e] for i, e in rest], kind="stable")
        for place in order[: self.kept(model.spec) - sum(floors.values())]:
            layer, expert = rest[place]
            plan[layer].add(expert)
        return {layer: tuple(sorted(experts)) for layer, experts in plan.items()}
