"""Which matrix gets which rank: the same for all, by score, by tails, or under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights
from moejax.compress.costs import Cost
from moejax.compress.expert_scores import ExpertScore
from moejax.compress.loss_scores import ModelScore
from moejax.compress.solvers import GreedyUpgrades, IntegerProgram, Problem, Solver
from moejax.core import SpecError, check_that, spec
from moejax.models import DecoderLM, layers
from moejax.moe import MoESpec

Matrices = Mapping[int, Sequence[str]]  # layer -> the names of matrices in it
Ranks = dict[int, dict[str, np.ndarray]]  # layer -> matrix -> int, of the shape of its lead
Shapes = Mapping[int, Mapping[str, tuple[int, ...]]]  # layer -> matrix -> [*lead, K, N]


@runtime_checkable
class RankPolicy(Protocol):
    """Gives every matrix, of each expert, a rank; a frozen spec. least_rank: none is below it."""

    @property
    def least_rank(self) -> int: ...

    def needs(self) -> tuple[Accumulator, ...]:
        """The statistics that `decide` reads."""
        ...

    def outline(self, shapes: Shapes) -> Ranks:
        """Ranks such as `decide` may give, from shapes alone; SpecError where none can be."""
        ...

    def decide(self, stats: Statistics, model: DecoderLM, shapes: Shapes) -> Ranks: ...


@spec
class UniformRank:
    """The same rank for every matrix; SpecError where it is above one's."""

    rank: int

    def check(self) -> None:
        check_that(self.rank >= 0, self, "rank", "Give 1 or more; 0 leaves the factors out.")

    @property
    def least_rank(self) -> int:
        return self.rank

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def outline(self, shapes: Shapes) -> Ranks:
        for layer, matrices in shapes.items():
            for matrix, shape in matrices.items():
                if self.rank:
                    weights.check_rank(self.rank, shape, f"layers.{layer}.{matrix}")
        return _filled(shapes, lambda shape: self.rank)

    def decide(self, stats: Statistics, model: DecoderLM, shapes: Shapes) -> Ranks:
        return self.outline(shapes)


@spec
class ProportionalRanks:
    """r_e = floor((I_e + eps)^alpha / sum_j (I_j + eps)^alpha * mean_rank * experts), per layer.

    MoE-I2 (arXiv:2411.01016, eq. 5), with the floor around the whole product; with `Frequency` and
    rounding = "nearest" it is the frequency policy of MiLo (arXiv:2504.02658). The three matrices
    of an expert share its rank. No rank is above that of a matrix, nor below `least`.
    mean_rank: of all experts of a layer; what the bounds cut off or add is not handed on.
    """

    mean_rank: float
    score: ExpertScore | ModelScore
    alpha: float = 1.0
    epsilon: float = 0.0
    least: int = 1
    rounding: Literal["down", "nearest"] = "down"

    def check(self) -> None:
        check_that(self.mean_rank > 0, self, "mean_rank", "Give a rank above 0.")
        check_that(self.alpha >= 0, self, "alpha", "Use 0 for equal ranks, 1 for proportional.")
        check_that(self.epsilon >= 0, self, "epsilon", "Give 0 or a small number above.")
        check_that(self.least >= 0, self, "least", "Use 1, or 0 where the method takes it.")

    @property
    def least_rank(self) -> int:
        return self.least

    def needs(self) -> tuple[Accumulator, ...]:
        return () if isinstance(self.score, ModelScore) else self.score.needs()

    def outline(self, shapes: Shapes) -> Ranks:
        for layer, matrices in shapes.items():
            _require_experts(self, layer, matrices)
            for matrix, shape in matrices.items():
                name = f"layers.{layer}.{matrix}"
                weights.check_rank(max(math.ceil(self.mean_rank), self.least), shape, name)
        return _filled(shapes, lambda shape: max(self.least, math.floor(self.mean_rank)))

    def decide(self, stats: Statistics, model: DecoderLM, shapes: Shapes) -> Ranks:
        found: Ranks = {}
        for layer, score_E in scored(self.score, stats, model, list(shapes)).items():
            if np.isinf(score_E).any():
                raise SpecError(
                    f"{type(self.score).__name__} gives layer {layer} infinite scores.",
                    "The model or its calibration text overflows: check them.",
                    field="score",
                )
            score_E = np.maximum(score_E, 0)  # a loss that falls without the expert: no importance
            share_E = (score_E + self.epsilon) ** self.alpha
            total = share_E.sum()
            share_E = share_E / total if total > 0 else np.full(len(share_E), 1 / len(share_E))
            exact_E = share_E * self.mean_rank * len(share_E)
            # A product that is whole but for rounding must not lose a rank.
            rank_E = np.floor(exact_E + (0.5 if self.rounding == "nearest" else 1e-9))
            found[layer] = {
                matrix: np.clip(rank_E, self.least, min(shape[-2:])).astype(int)
                for matrix, shape in shapes[layer].items()
            }
        return found


@spec
class KurtosisRanks:
    """MiLo's policy by tails: rank 2^(round(kurtosis) + shift), per matrix, 0 below kurtosis 1.

    As its released code has it: above 9 the rank is `most`. Kurtosis is in excess of the normal
    distribution's 3: that of a matrix is never below 1, and so the rule's first case would never
    be. shift: 2 where the mean rank of Mixtral should be 16, 3 for 32. most: 1024 there; no rank
    is above the matrix's.
    """

    shift: int = 2
    most: int = 1024

    def check(self) -> None:
        check_that(self.shift >= 0, self, "shift", "2 or 3 are the paper's.")
        check_that(self.most >= 1, self, "most", "1024 is the paper's.")

    @property
    def least_rank(self) -> int:
        return 0

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def outline(self, shapes: Shapes) -> Ranks:
        """For tails of excess kurtosis 1."""
        return _filled(shapes, lambda shape: min(2 ** (1 + self.shift), self.most, *shape[-2:]))

    def decide(self, stats: Statistics, model: DecoderLM, shapes: Shapes) -> Ranks:
        blocks, found = layers(model), {}
        for layer, matrices in shapes.items():
            named = block_weights(blocks[layer])
            found[layer] = {}
            for matrix, shape in matrices.items():
                tail = np.asarray(_excess_kurtosis(weights.materialize(named[matrix])))
                whole = np.clip(np.round(tail), 0, 9)
                rank = np.where(
                    tail < 1, 0, np.where(tail > 9, self.most, 2 ** (whole + self.shift))
                )
                found[layer][matrix] = np.minimum(rank, min(self.most, *shape[-2:])).astype(int)
        return found


@spec
class RankBudget:
    """The ranks of least cost whose mean over a layer's experts is at most `mean_rank`.

    The knapsack that allocates bits (`BitBudget`), with ranks for bits: `cost` is asked what the
    truncated SVD at each of `ranks` costs. shards: a divisor of how many experts get each rank, the
    devices of an expert axis. The other policies give ranks one by one, and banks of unequal parts.
    """

    mean_rank: float
    ranks: tuple[int, ...]
    cost: Cost
    solver: Solver = IntegerProgram()
    shards: int = 1

    def check(self) -> None:
        check_that(self.shards >= 1, self, "shards", "Use 1 where experts are not sharded.")
        fits = bool(self.ranks) and len(set(self.ranks)) == len(self.ranks) and min(self.ranks) >= 1
        check_that(fits, self, "ranks", "Give ranks of 1 or more, each once.")
        check_that(self.mean_rank > 0, self, "mean_rank", "Give a rank above 0.")

    @property
    def least_rank(self) -> int:
        return min(self.ranks)

    def needs(self) -> tuple[Accumulator, ...]:
        return self.cost.needs(self._choices)

    def outline(self, shapes: Shapes) -> Ranks:
        costs = {}
        for layer, matrices in shapes.items():
            _require_experts(self, layer, matrices)
            for matrix, shape in matrices.items():
                for rank in self.ranks:
                    weights.check_rank(rank, shape, f"layers.{layer}.{matrix}")
            stored = next(iter(matrices.values()))[0]
            costs[layer] = np.tile(1 / np.asarray(self.ranks, float), (stored, 1))
        return self._solved(costs, shapes, GreedyUpgrades())

    def decide(self, stats: Statistics, model: DecoderLM, shapes: Shapes) -> Ranks:
        blocks = layers(model)
        costs = {
            layer: self.cost(layer, blocks[layer], stats.layers[layer], self._choices)
            for layer in shapes
        }
        return self._solved(costs, shapes, self.solver)

    @property
    def _choices(self) -> tuple[Any, ...]:
        return tuple(_AtRank(rank=rank) for rank in self.ranks)

    def _solved(self, costs: dict[int, np.ndarray], shapes: Shapes, solver: Solver) -> Ranks:
        ranks_B, found = np.asarray(self.ranks), {}
        for layer, cost_ExB in costs.items():
            budget, name = self.mean_rank * len(cost_ExB), f"layer {layer}"
            if self.mean_rank < ranks_B.min():
                raise SpecError(
                    f"RankBudget.mean_rank = {self.mean_rank:g} is below the least of "
                    f"RankBudget.ranks = {list(self.ranks)} in layer {layer}.",
                    f"Allow {ranks_B.min()} or more, or add a smaller rank.",
                    field="mean_rank",
                )
            problem = Problem(cost_ExB, ranks_B, budget, shards=self.shards, name=name)
            rank_E = ranks_B[solver(problem)]
            found[layer] = dict.fromkeys(shapes[layer], rank_E)
        return found


@dataclass(frozen=True)
class _AtRank:
    """What a cost asks of a grid, of the truncated SVD at a rank; its bits are the rank."""

    rank: int

    @property
    def bits(self) -> int:
        return self.rank

    def __call__(self, w: Array, name: str = "") -> weights.LowRank:
        return weights.truncated_svd(w, self.rank, name=name)


def scored(
    score: ExpertScore | ModelScore, stats: Statistics, model: DecoderLM, chosen: Sequence[int]
) -> dict[int, np.ndarray]:
    """Layer -> float64 [E], of the layers chosen; SpecError for scores of another shape or NaN."""
    blocks = layers(model)
    if isinstance(score, ModelScore):
        found = score.of_model(stats, model, chosen)
    else:
        found = {i: score(i, blocks[i], stats.layers[i]) for i in chosen}
    for layer, score_E in found.items():
        ffn = blocks[layer].spec.ffn
        assert isinstance(ffn, MoESpec)
        experts = ffn.experts
        score_E = found[layer] = np.asarray(score_E, np.float64)
        if score_E.shape != (experts,) or np.isnan(score_E).any():
            raise SpecError(
                f"{score} gives layer {layer} the scores {score_E.tolist()}.",
                f"A score is one number for each of {experts} experts.",
                field="score",
            )
    return found


def _filled(shapes: Shapes, rank: Any) -> Ranks:
    return {
        layer: {m: np.full(shape[:-2], rank(shape), int) for m, shape in matrices.items()}
        for layer, matrices in shapes.items()
    }


def _require_experts(owner: RankPolicy, layer: int, matrices: Mapping[str, Any]) -> None:
    others = [m for m in matrices if not m.startswith(EXPERTS)]
    if others:
        raise SpecError(
            f"{type(owner).__name__} ranks experts, but layers.{layer}.{others[0]} is of none.",
            "Name expert matrices alone, or use UniformRank for others.",
        )


def _excess_kurtosis(w: Array) -> Array:
    away = w - w.mean((-2, -1), keepdims=True)
    deviation = jnp.sqrt(jnp.square(away).mean((-2, -1), keepdims=True))
    return ((away / jnp.where(deviation > 0, deviation, 1)) ** 4).mean((-2, -1)) - 3
