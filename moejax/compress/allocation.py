"""Which expert gets which grid: allocations under a budget of bits, and by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from moejax.calibrate import Accumulator, Statistics
from moejax.compress.costs import Cost
from moejax.compress.expert_scores import ExpertScore
from moejax.compress.methods import Choice
from moejax.compress.solvers import GreedyUpgrades, IntegerProgram, Problem, Solver
from moejax.core import SpecError, check_that, spec
from moejax.models import DecoderLM, ModelSpec, layers
from moejax.moe import MoESpec

Plan = dict[int, tuple[int, ...]]  # MoE layer -> index into the grids, per stored expert
Grids = Sequence[Choice]


@runtime_checkable
class Allocation(Protocol):
    """Gives every stored expert of every MoE layer one of the grids; a frozen spec."""

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        """The statistics that `decide` reads."""
        ...

    def outline(self, model: ModelSpec, grids: Grids) -> Plan:
        """A plan as large as `decide` may give, from shapes alone; SpecError where none can be."""
        ...

    def decide(self, stats: Statistics, model: DecoderLM, grids: Grids) -> Plan: ...


@spec
class BitBudget:
    """The plan of least cost whose experts have `mean_bits` bits on average, or fewer.

    With `PMQCost` it is MC-MoE's PMQ (arXiv:2410.06270), whose at_least = ((3, 1), (2, 1)) keeps
    one expert of a layer at 3 bits and one at 2; with `MultiDomainCost` MoQa (arXiv:2503.21135).
    mean_bits: of the codes; scales and zeros come on top. at_least: (bits, experts) pairs.
    shards: a divisor of every count in every layer, the devices of an expert axis.
    per_layer: whether each layer keeps the budget and at_least, or all experts of the model do
    together, which then moves bits to layers where they save more.
    """

    mean_bits: float
    cost: Cost
    solver: Solver = IntegerProgram()
    at_least: tuple[tuple[int, int], ...] = ()
    shards: int = 1
    per_layer: bool = True

    def check(self) -> None:
        check_that(self.mean_bits > 0, self, "mean_bits", "Give bits per weight, such as 2.5.")
        distinct = len(dict(self.at_least)) == len(self.at_least)
        fits = distinct and all(bits > 0 and count >= 0 for bits, count in self.at_least)
        check_that(fits, self, "at_least", "Give (bits, experts) pairs, each width once.")
        check_that(self.shards >= 1, self, "shards", "Use 1 where experts are not sharded.")
        fix = "Buckets are equal layer by layer: use per_layer = True, or shards = 1."
        check_that(self.per_layer or self.shards == 1, self, "shards", fix)

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        return self.cost.needs(grids)

    def outline(self, model: ModelSpec, grids: Grids) -> Plan:
        costs = {
            layer: np.tile(4.0 ** -_bits(grids).astype(float), (stored, 1))
            for layer, stored in stored_experts(model).items()
        }
        return self._solved(model, costs, grids, GreedyUpgrades())

    def decide(self, stats: Statistics, model: DecoderLM, grids: Grids) -> Plan:
        blocks = layers(model)
        costs = {}
        for layer, stored in stored_experts(model.spec).items():
            cost_ExB = self.cost(layer, blocks[layer], stats.layers[layer], grids)
            if cost_ExB.shape != (stored, len(grids)):
                raise SpecError(
                    f"{type(self.cost).__name__} gives costs {list(cost_ExB.shape)} in layer "
                    f"{layer}, which stores {stored} experts, on {len(grids)} grids.",
                    "A cost is one number for each expert and grid.",
                    field="cost",
                )
            costs[layer] = cost_ExB
        return self._solved(model.spec, costs, grids, self.solver)

    def _solved(
        self, model: ModelSpec, costs: dict[int, np.ndarray], grids: Grids, solver: Solver
    ) -> Plan:
        if self.per_layer:
            return {
                layer: _tuple(solver(self._problem(cost_ExB, grids, f"layer {layer}")))
                for layer, cost_ExB in costs.items()
            }
        _require_one_size(model)
        whole = self._problem(np.concatenate(list(costs.values())), grids, "all layers")
        ends = np.cumsum([len(cost_ExB) for cost_ExB in costs.values()])
        return {
            layer: _tuple(part)
            for layer, part in zip(costs, np.split(solver(whole), ends[:-1]), strict=True)
        }

    def _problem(self, cost_ExB: np.ndarray, grids: Grids, name: str) -> Problem:
        bits_B = _bits(grids)
        at_least = {}
        for bits, count in self.at_least:
            found = np.flatnonzero(bits_B == bits)
            if len(found) != 1:
                raise SpecError(
                    f"BitBudget.at_least names {bits} bits, which {len(found)} of the grids have: "
                    f"their bits are {bits_B.tolist()}.",
                    "Name widths that exactly one grid has.",
                    field="at_least",
                )
            at_least[int(found[0])] = count
        return Problem(
            cost_ExB, bits_B, self.mean_bits * len(cost_ExB), at_least, self.shards, name
        )


@spec
class RankedExperts:
    """The `top` experts of highest score get the first grid, the other experts the second.

    QuantMoE-Bench (arXiv:2406.08155) keeps the two most frequent experts of a layer at 4 bits and
    the rest at 2. The lower index goes first among equals.
    """

    score: ExpertScore
    top: int = 2

    def check(self) -> None:
        check_that(self.top >= 0, self, "top", "Use 0 to give all experts the second grid.")

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def outline(self, model: ModelSpec, grids: Grids) -> Plan:
        return {
            layer: self._plan(layer, np.zeros(stored), grids)
            for layer, stored in stored_experts(model).items()
        }

    def decide(self, stats: Statistics, model: DecoderLM, grids: Grids) -> Plan:
        blocks, plan = layers(model), {}
        for layer, stored in stored_experts(model.spec).items():
            found = self.score(layer, blocks[layer], stats.layers[layer])
            score_E = np.asarray(found, np.float64)
            if score_E.shape != (stored,) or np.isnan(score_E).any():
                raise SpecError(
                    f"{self.score} gives layer {layer} the scores {score_E.tolist()}.",
                    f"A score is one number for each of {stored} stored experts.",
                    field="score",
                )
            plan[layer] = self._plan(layer, score_E, grids)
        return plan

    def _plan(self, layer: int, score_E: np.ndarray, grids: Grids) -> tuple[int, ...]:
        if len(grids) != 2:
            raise SpecError(
                f"RankedExperts chooses between 2 grids, but there are {len(grids)}.",
                "Give the grid of the best experts, then that of the rest.",
            )
        if self.top > len(score_E):
            raise SpecError(
                f"RankedExperts.top = {self.top}, but layer {layer} has {len(score_E)} experts.",
                f"Choose at most {len(score_E)}.",
                field="top",
            )
        choice_E = np.ones(len(score_E), int)
        choice_E[np.argsort(-score_E, kind="stable")[: self.top]] = 0
        return _tuple(choice_E)


def stored_experts(model: ModelSpec) -> dict[int, int]:
    """MoE layer -> how many experts it stores; SpecError for a model without experts."""
    found = {
        i: layer.ffn.stored
        for i, layer in enumerate(model.layers)
        if isinstance(layer.ffn, MoESpec)
    }
    if not found:
        raise SpecError("no layer of the model has experts.", "Allocate bits in an MoE model.")
    return found


def _require_one_size(model: ModelSpec) -> None:
    widths = {layer.ffn.width for layer in model.layers if isinstance(layer.ffn, MoESpec)}
    if len(widths) > 1:
        raise SpecError(
            f"BitBudget.per_layer = False weighs all experts alike, but their hidden widths are "
            f"{sorted(widths)}.",
            "Use per_layer = True where layers have experts of several sizes.",
            field="per_layer",
        )


def _bits(grids: Grids) -> np.ndarray:
    return np.array([grid.bits for grid in grids])


def _tuple(choice_E: np.ndarray) -> tuple[int, ...]:
    return tuple(int(choice) for choice in choice_E)
