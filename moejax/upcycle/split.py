"""Splits: which of a feed-forward's hidden neurons go to which expert.

A neuron of a gated feed-forward is a column of gate and of up, and a row of down; its output does
not depend on the others, so that any partition of the neurons keeps the sum of all experts.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from scipy.optimize import linear_sum_assignment

from moejax.core import check_that, spec


@runtime_checkable
class Split(Protocol):
    """Deals F neurons to E experts of F / E neurons each.

    gate_DxF: the gate matrix. Returns order_F, a permutation: expert e gets the neurons
    order[e F / E : (e + 1) F / E]. E divides F; that is the caller's duty.
    """

    def __call__(
        self, gate_DxF: np.ndarray, experts: int, random: np.random.Generator
    ) -> np.ndarray: ...


@spec
class Contiguous:
    """Neighbours stay together."""

    def __call__(
        self, gate_DxF: np.ndarray, experts: int, random: np.random.Generator
    ) -> np.ndarray:
        return np.arange(gate_DxF.shape[1])


@spec
class RandomSplit:
    """Independent random sets, LLaMA-MoE's best (arXiv:2406.16554)."""

    def __call__(
        self, gate_DxF: np.ndarray, experts: int, random: np.random.Generator
    ) -> np.ndarray:
        return random.permutation(gate_DxF.shape[1])


@spec
class BalancedKMeans:
    """Neurons with gate vectors of like direction together (MoEfication, arXiv:2110.01786).

    k-means on the columns of gate, scaled to length 1; each assignment is the cheapest of those
    that give every centre equally many. rounds: assignments at most; it stops once none changes.
    """

    rounds: int = 4

    def check(self) -> None:
        check_that(self.rounds >= 1, self, "rounds", "Use Contiguous for no clustering.")

    def __call__(
        self, gate_DxF: np.ndarray, experts: int, random: np.random.Generator
    ) -> np.ndarray:
        v_FxD = np.asarray(gate_DxF, np.float64).T
        v_FxD = v_FxD / np.maximum(np.linalg.norm(v_FxD, axis=1, keepdims=True), 1e-30)
        centre_ExD = _spread_centres(v_FxD, experts, random)
        expert_F = np.full(len(v_FxD), -1)
        for _ in range(self.rounds):
            before, expert_F = expert_F, _balanced_nearest(v_FxD, centre_ExD)
            if np.array_equal(before, expert_F):
                break
            centre_ExD = np.stack([v_FxD[expert_F == e].mean(axis=0) for e in range(experts)])
        return np.argsort(expert_F, kind="stable")


def _spread_centres(v_FxD: np.ndarray, experts: int, random: np.random.Generator) -> np.ndarray:
    """First centres far from one another: each drawn by squared distance (k-means++)."""
    centres = [v_FxD[random.integers(len(v_FxD))]]
    distance_F = np.full(len(v_FxD), np.inf)
    for _ in range(experts - 1):
        distance_F = np.minimum(distance_F, ((v_FxD - centres[-1]) ** 2).sum(axis=1))
        total = distance_F.sum()
        share_F = distance_F / total if total > 0 else None  # all alike: any will do
        centres.append(v_FxD[random.choice(len(v_FxD), p=share_F)])
    return np.stack(centres)


def _balanced_nearest(v_FxD: np.ndarray, centre_ExD: np.ndarray) -> np.ndarray:
    """expert_F: the assignment of least total squared distance with F / E neurons per centre."""
    places = len(v_FxD) // len(centre_ExD)
    cost_FxE = (centre_ExD**2).sum(axis=1) - 2 * v_FxD @ centre_ExD.T
    return linear_sum_assignment(np.repeat(cost_FxE, places, axis=1))[1] // places
