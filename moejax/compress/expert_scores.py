"""How much an expert counts: scores that decide which experts a layer keeps."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from moejax.calibrate import Accumulator, ExpertCounts, GateMass, LayerStatistics, SoftCounts
from moejax.core import check_that, spec


@runtime_checkable
class ExpertScore(Protocol):
    """A number per expert of a layer; experts of low score go first."""

    def needs(self) -> tuple[Accumulator, ...]: ...

    def __call__(self, layer: int, experts: int, stats: LayerStatistics) -> np.ndarray: ...


@spec
class Frequency:
    """How many tokens were routed to the expert (arXiv:2404.05089)."""

    def needs(self) -> tuple[Accumulator, ...]:
        return (ExpertCounts(),)

    def __call__(self, layer: int, experts: int, stats: LayerStatistics) -> np.ndarray:
        return stats[ExpertCounts.name]


@spec
class GateMassScore:
    """The sum of the gate weights that the expert received."""

    def needs(self) -> tuple[Accumulator, ...]:
        return (GateMass(),)

    def __call__(self, layer: int, experts: int, stats: LayerStatistics) -> np.ndarray:
        return stats[GateMass.name]


@spec
class MeanProbability:
    """The router's probability of the expert, mean over all tokens (arXiv:2406.02500).

    The sum, to be exact, which orders the experts of a layer alike.
    """

    def needs(self) -> tuple[Accumulator, ...]:
        return (SoftCounts(),)

    def __call__(self, layer: int, experts: int, stats: LayerStatistics) -> np.ndarray:
        return stats[SoftCounts.name]


@spec
class RandomScore:
    """A fixed random order per layer: the control that a score has to beat."""

    seed: int = 0

    def check(self) -> None:
        """Seeds count from 0."""
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, experts: int, stats: LayerStatistics) -> np.ndarray:
        return np.random.default_rng((self.seed, layer)).random(experts)
