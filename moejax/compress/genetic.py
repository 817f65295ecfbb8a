"""A genetic search over subsets of experts (MoE-I2, arXiv:2411.01016, section 3.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np

from moejax.core import MoejaxError, SpecError, check_that, spec

Subset = tuple[int, ...]  # ascending
Losses = Callable[[np.ndarray], np.ndarray]  # int [n, r] subsets -> float [n]


@spec
class GeneticSearch:
    """Subsets of least loss: the better half breeds, by unions of two, and mutates by replacement.

    A child takes its experts at random from the union of those of two parents; with probability
    `mutation` one of them is then replaced by an expert outside. Half of the next population are
    the best of this one, so that the best found is never lost. Where there are no more subsets than
    `population` all are tried. Every subset is measured once.
    """

    population: int = 100
    generations: int = 50
    mutation: float = 0.2
    seed: int = 0

    def check(self) -> None:
        check_that(self.population >= 2, self, "population", "Two can breed; 100 is the paper's.")
        check_that(self.generations >= 0, self, "generations", "50 is the paper's.")
        check_that(0 <= self.mutation <= 1, self, "mutation", "Give a probability.")
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def __call__(
        self, losses: Losses, experts: int, size: int, best: int = 1, stream: int = 0
    ) -> list[Subset]:
        """The `best` subsets of `size` of so many experts, least loss first; fewer if there are no
        more. stream: tells the random numbers of one search from those of another, as of layers.

        Raises SpecError for an impossible size, MoejaxError for losses that are NaN.
        """
        if not 0 <= size <= experts:
            raise SpecError(f"{size} of {experts} experts cannot be chosen.", "Choose fewer.")
        known: dict[Subset, float] = {}

        def measure(subsets: Iterable[Subset]) -> None:
            new = [subset for subset in dict.fromkeys(subsets) if subset not in known]
            if not new:
                return
            found = np.asarray(losses(np.array(new, int).reshape(len(new), size)), np.float64)
            if np.isnan(found).any():
                raise MoejaxError(
                    f"the loss of the experts {list(new[int(np.isnan(found).argmax())])} is NaN.",
                    "The model or its calibration text overflows: check them.",
                )
            known.update(zip(new, found.tolist(), strict=True))

        def ranked() -> list[Subset]:
            return sorted(known, key=lambda subset: (known[subset], subset))

        if math.comb(experts, size) <= self.population:
            measure(itertools.combinations(range(experts), size))
            return ranked()[:best]
        draws = np.random.default_rng((self.seed, stream))
        measure(_sorted(draws.permutation(experts)[:size]) for _ in range(self.population))
        for _ in range(self.generations):
            parents = ranked()[: max(2, self.population // 2)]
            measure(
                self._child(parents, experts, size, draws)
                for _ in range(self.population - len(parents))
            )
        return ranked()[:best]

    def _child(
        self, parents: list[Subset], experts: int, size: int, draws: np.random.Generator
    ) -> Subset:
        first, second = (parents[i] for i in draws.choice(len(parents), 2, replace=False))
        child = draws.permutation(sorted({*first, *second}))[:size]
        if draws.random() < self.mutation:
            outside = np.setdiff1d(np.arange(experts), child)
            child[draws.integers(size)] = draws.choice(outside)
        return _sorted(child)


def _sorted(subset: np.ndarray) -> Subset:
    return tuple(sorted(subset.tolist()))
