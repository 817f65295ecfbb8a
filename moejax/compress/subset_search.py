"""Searches for the subset of a layer's experts that loses least: all, greedy, genetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from moejax.core import SpecError, check_that, spec

Loss = Callable[[np.ndarray], np.ndarray]  # subsets int [N, r], ascending rows -> float64 [N]


@runtime_checkable
class SubsetSearch(Protocol):
    """Finds `kept` of `experts` experts; a frozen spec."""

    def check_size(self, experts: int, kept: int, layer: int) -> None:
        """Raises SpecError where it cannot search so many."""
        ...

    def __call__(self, loss: Loss, experts: int, kept: int, layer: int) -> tuple[int, ...]: ...


@spec
class ExhaustiveSubsets:
    """Every subset, the first of least loss in lexicographic order (NAEE, arXiv:2402.14800).

    most: subsets of a layer above which it refuses.
    """

    most: int = 100_000

    def check(self) -> None:
        check_that(self.most >= 1, self, "most", "100000 take minutes on small layers.")

    def check_size(self, experts: int, kept: int, layer: int) -> None:
        count = math.comb(experts, kept)
        if count > self.most:
            raise SpecError(
                f"{count:,} subsets of {kept} of {experts} experts in layer {layer} are above "
                f"ExhaustiveSubsets.most = {self.most:,}.",
                "Use GeneticSubsets() or GreedySubsets(), or raise most.",
                field="most",
            )

    def __call__(self, loss: Loss, experts: int, kept: int, layer: int) -> tuple[int, ...]:
        found, least = (), math.inf
        subsets = itertools.combinations(range(experts), kept)
        while part := list(itertools.islice(subsets, 4096)):
            losses = loss(np.asarray(part).reshape(len(part), kept))
            if losses.min() < least:
                found, least = part[int(losses.argmin())], float(losses.min())
        return tuple(found)


@spec
class GreedySubsets:
    """One expert at a time, always the one whose loss adds least to what is lost already."""

    def check_size(self, experts: int, kept: int, layer: int) -> None:
        pass

    def __call__(self, loss: Loss, experts: int, kept: int, layer: int) -> tuple[int, ...]:
        left = tuple(range(experts))
        while len(left) > kept:
            fewer = [left[:i] + left[i + 1 :] for i in range(len(left))]
            left = fewer[int(loss(np.asarray(fewer)).argmin())]
        return left


@spec
class GeneticSubsets:
    """Subsets that breed: a child takes its experts from the union of two parents, and with
    probability `mutation` changes one of them for one that it lacks (MoE-I2, arXiv:2411.01016).

    Parents are drawn from the better half; the best `population` of parents and children live on,
    so that the best found is never lost. 100 and 50 are the paper's.
    """

    population: int = 100
    generations: int = 50
    mutation: float = 0.3
    seed: int = 0

    def check(self) -> None:
        check_that(self.population >= 2, self, "population", "It takes two parents: use 100.")
        check_that(self.generations >= 0, self, "generations", "50 are usual.")
        check_that(0 <= self.mutation <= 1, self, "mutation", "It is a probability.")
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def check_size(self, experts: int, kept: int, layer: int) -> None:
        pass

    def __call__(self, loss: Loss, experts: int, kept: int, layer: int) -> tuple[int, ...]:
        draws = np.random.default_rng((self.seed, layer))
        known: dict[tuple[int, ...], float] = {}

        def weigh(subsets: list[tuple[int, ...]]) -> None:
            new = [subset for subset in dict.fromkeys(subsets) if subset not in known]
            if new:
                found = loss(np.asarray(new).reshape(len(new), kept))
                known.update(zip(new, found.tolist(), strict=True))

        def drawn(among: list[int]) -> tuple[int, ...]:
            return tuple(sorted(draws.choice(among, kept, replace=False).tolist()))

        living = [drawn(list(range(experts))) for _ in range(self.population)]
        weigh(living)
        living = sorted(dict.fromkeys(living), key=known.__getitem__)
        for _ in range(self.generations):
            parents = living[: max(2, len(living) // 2)]
            children = []
            for _ in range(self.population):
                first, second = (parents[i] for i in draws.integers(len(parents), size=2))
                child = drawn(sorted({*first, *second}))
                lacks = [e for e in range(experts) if e not in child]
                if lacks and draws.random() < self.mutation:
                    gone = int(draws.integers(kept))
                    rest = child[:gone] + child[gone + 1 :]
                    child = tuple(sorted((*rest, lacks[int(draws.integers(len(lacks)))])))
                children.append(child)
            weigh(children)
            living = sorted(dict.fromkeys(living + children), key=known.__getitem__)
            living = living[: self.population]
        return living[0]
