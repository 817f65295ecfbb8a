"""Solvers of the multiple-choice knapsack: one precision per expert under a budget of bits."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy import optimize, sparse

from moejax.core import MoejaxError, SpecError, check_that, spec


@dataclasses.dataclass(frozen=True)
class Problem:
    """min sum_e cost[e, choice_e] subject to sum_e bits[choice_e] <= budget (MC-MoE, eq. 5).

    cost_ExB: float64, finite; bits_B: of each choice; budget: bits of all E experts together.
    at_least: choice -> how many experts take it at least. shards: a divisor of how many take each
    choice, so that expert parallelism over as many devices finds buckets of equal size.
    name: what is solved, for errors and for the random stream of `RandomAllocation`.
    """

    cost_ExB: np.ndarray
    bits_B: np.ndarray
    budget: float
    at_least: Mapping[int, int] = dataclasses.field(default_factory=dict)
    shards: int = 1
    name: str = "the experts"

    @property
    def experts(self) -> int:
        return self.cost_ExB.shape[0]

    @property
    def room(self) -> float:
        """The budget, with room for the rounding of mean bits times experts."""
        return self.budget + 1e-6

    def least_counts(self) -> np.ndarray:
        """How many experts each choice must have, in whole shards: int [B]."""
        least_B = np.zeros(len(self.bits_B), int)
        for choice, count in self.at_least.items():
            least_B[choice] = math.ceil(count / self.shards) * self.shards
        return least_B

    def check(self) -> None:
        """Raises SpecError for a problem without a solution, MoejaxError for costs that are NaN."""
        E, B = self.cost_ExB.shape
        if not np.isfinite(self.cost_ExB).all():
            bad = np.flatnonzero(~np.isfinite(self.cost_ExB).all(1)).tolist()
            raise MoejaxError(
                f"the costs of experts {bad} of {self.name} are not finite.",
                "The weights or the calibration text overflow: check them.",
            )
        if len(self.bits_B) != B:
            raise SpecError(
                f"{self.name}: {len(self.bits_B)} bit widths for {B} choices.", "Give one each."
            )
        if self.shards < 1 or E % self.shards:
            raise SpecError(
                f"shards = {self.shards} does not divide {E} experts of {self.name}.",
                f"Choose a divisor of {E}.",
                field="shards",
            )
        wrong = [i for i, n in self.at_least.items() if not 0 <= i < B or n < 0]
        least_B = self.least_counts() if not wrong else np.zeros(B, int)
        if wrong or least_B.sum() > E:
            of = "" if self.shards == 1 else f", in whole shards of {self.shards}"
            raise SpecError(
                f"at_least = {dict(self.at_least)} is impossible with {E} experts and {B} choices "
                f"of {self.name}{of}.",
                "Ask for fewer experts.",
                field="at_least",
            )
        spent = float(least_B @ self.bits_B + (E - least_B.sum()) * np.min(self.bits_B))
        if spent > self.room:
            raise SpecError(
                f"{self.budget / E:g} mean bits are not enough for {self.name}: with bits "
                f"{list(map(float, self.bits_B))} and at_least = {dict(self.at_least)} the least "
                f"is {spent / E:g}.",
                f"Allow {spent / E:g} mean bits or more, or add a grid of fewer bits.",
                field="budget",
            )

    def cost(self, choice_E: np.ndarray) -> float:
        """The objective."""
        return float(self.cost_ExB[np.arange(self.experts), choice_E].sum())

    def bits(self, choice_E: np.ndarray) -> float:
        """Bits of all experts together."""
        return float(np.asarray(self.bits_B)[choice_E].sum())

    def allows(self, choice_ExN: np.ndarray) -> np.ndarray:
        """Whether choices [E] or [N, E] keep budget, least counts and shards: bool [] or [N]."""
        counts = np.stack([(choice_ExN == b).sum(-1) for b in range(len(self.bits_B))], -1)
        fits = counts @ np.asarray(self.bits_B) <= self.room
        return fits & ((counts >= self.least_counts()) & (counts % self.shards == 0)).all(-1)


@runtime_checkable
class Solver(Protocol):
    """Chooses for every expert: int [E], an index into the choices."""

    def __call__(self, problem: Problem) -> np.ndarray: ...


@spec
class IntegerProgram:
    """The exact optimum, by branch and bound (HiGHS).

    seconds: after which an unfinished search is an error.
    """

    seconds: float = 60.0

    def check(self) -> None:
        check_that(self.seconds > 0, self, "seconds", "A minute is plenty for one layer.")

    def __call__(self, problem: Problem) -> np.ndarray:
        problem.check()
        E, B = problem.cost_ExB.shape
        # Variables: x[e, b] in {0, 1}, then the shards z[b] that take a choice.
        each = sparse.hstack([sparse.kron(sparse.eye(E), np.ones((1, B))), np.zeros((E, B))])
        per_choice = sparse.kron(np.ones((1, E)), sparse.eye(B))
        whole = sparse.hstack([per_choice, -problem.shards * sparse.eye(B)])
        spent = np.concatenate([np.tile(problem.bits_B, E), np.zeros(B)])
        least_B = problem.least_counts() // problem.shards
        low: Any = np.concatenate([np.zeros(E * B), least_B])
        high: Any = np.concatenate([np.ones(E * B), np.full(B, E // problem.shards)])
        found = optimize.milp(
            np.concatenate([_scaled(problem.cost_ExB).ravel(), np.zeros(B)]),
            integrality=np.ones((E + 1) * B),
            bounds=optimize.Bounds(low, high),
            constraints=[
                optimize.LinearConstraint(each.tocsr(), 1, 1),
                optimize.LinearConstraint(whole.tocsr(), 0, 0),
                optimize.LinearConstraint(spent[None], -np.inf, problem.room),
            ],
            options={"mip_rel_gap": 0, "time_limit": self.seconds},
        )
        if found.status != 0:
            raise MoejaxError(
                f"the integer program of {problem.name} found no optimum within "
                f"IntegerProgram.seconds = {self.seconds:g}: {found.message}",
                "Allow more seconds, or use GreedyUpgrades().",
            )
        return found.x[: E * B].reshape(E, B).argmax(1)


@spec
class GreedyUpgrades:
    """From the fewest bits upwards, always the upgrade that saves most cost per bit and fits.

    An upgrade takes `shards` experts from one choice to another at once, those that gain most.
    """

    def __call__(self, problem: Problem) -> np.ndarray:
        problem.check()
        cost_ExB, bits_B = problem.cost_ExB, np.asarray(problem.bits_B)
        choice_E, least_B = _cheapest(problem), problem.least_counts()
        noise = 1e-12 * np.abs(cost_ExB).sum()  # a gain below it could be undone for ever
        while True:
            best, move = 0.0, None
            counts_B = np.bincount(choice_E, minlength=len(bits_B))
            spent = counts_B @ bits_B
            for old, new in np.ndindex(len(bits_B), len(bits_B)):
                more = problem.shards * (bits_B[new] - bits_B[old])
                kept = counts_B[old] - problem.shards
                if old == new or kept < least_B[old] or spent + more > problem.room:
                    continue
                experts = np.flatnonzero(choice_E == old)
                gain = cost_ExB[experts, old] - cost_ExB[experts, new]
                first = np.argsort(-gain, kind="stable")[: problem.shards]
                saved = gain[first].sum()
                rate = saved / more if more > 0 else np.inf
                if saved > noise and rate > best:
                    best, move = rate, (experts[first], new)
            if move is None:
                return choice_E
            choice_E[move[0]] = move[1]


@spec
class RandomAllocation:
    """The choices of another solver, dealt to the experts at random: the control.

    So it stores exactly as many bits in buckets of the same sizes, and knows of no expert.
    """

    seed: int
    like: Solver = IntegerProgram()

    def check(self) -> None:
        """Seeds count from 0."""
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def __call__(self, problem: Problem) -> np.ndarray:
        draws = np.random.default_rng((self.seed, zlib.crc32(problem.name.encode())))
        return draws.permutation(self.like(problem))


@spec
class Exhaustive:
    """Every allocation tried: the oracle, for up to a million of them."""

    def __call__(self, problem: Problem) -> np.ndarray:
        problem.check()
        E, B = problem.cost_ExB.shape
        if B**E > 1_000_000:
            raise SpecError(
                f"{B}^{E} allocations of {problem.name} are too many to try.",
                "Use IntegerProgram(), which finds the same.",
            )
        tried_NxE = np.stack(np.unravel_index(np.arange(B**E), (B,) * E), -1)
        allowed_NxE = tried_NxE[problem.allows(tried_NxE)]
        return allowed_NxE[problem.cost_ExB[np.arange(E), allowed_NxE].sum(1).argmin()]


def _cheapest(problem: Problem) -> np.ndarray:
    """The fewest bits that the constraints allow, given to the experts that gain most by them."""
    lowest = int(np.argmin(problem.bits_B))
    choice_E, least_B = np.full(problem.experts, lowest), problem.least_counts()
    for b in np.argsort(problem.bits_B, kind="stable")[::-1]:
        free = np.flatnonzero(choice_E == lowest)
        gain = problem.cost_ExB[free, lowest] - problem.cost_ExB[free, b]
        if b != lowest:
            choice_E[free[np.argsort(-gain, kind="stable")[: least_B[b]]]] = b
    return choice_E


def _scaled(cost_ExB: np.ndarray) -> np.ndarray:
    """What each expert loses over its best choice, the largest 1e6.

    HiGHS stops within an absolute 1e-6 of the optimum, and takes what is smaller for zero.
    """
    over_ExB = cost_ExB - cost_ExB.min(1, keepdims=True)
    largest = over_ExB.max()
    return over_ExB * (1e6 / largest) if largest > 0 else over_ExB
