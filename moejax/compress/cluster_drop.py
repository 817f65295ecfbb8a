"""Of experts that behave alike one stays (STUN, arXiv:2409.06211)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moejax.calibrate import Accumulator, CoActivation, Statistics
from moejax.compress.block_weights import block_weights, expert_matrices
from moejax.compress.expert_drop import Plan
from moejax.compress.global_drop import DropsAnywhere, check_shares
from moejax.core import SpecError, check_that, spec
from moejax.models import Block, DecoderLM, ModelSpec, layers
from moejax.weights import materialize

ROUTER = "moe.router.scores.kernel"


@spec
class ClusterDrop(DropsAnywhere):
    """Clusters the experts of each layer, and keeps of each cluster the one nearest its centroid.

    d_ij = ||w_i - w_j||_2 - coactivation C_ij / mean C, of router columns w and of tokens C_ij that
    chose both experts: no forward pass but the one that counts. The closest pair unites its
    clusters, if all distances between them are below a threshold, until none does. The threshold,
    one for all layers, is the one that leaves 1 - fraction of all experts, or the nearest number
    above that can be had. Every layer keeps `floor` experts, and as many as its router chooses.
    The centroid is that of the weights of all matrices; the router keeps the columns of what stays.
    """

    fraction: float
    coactivation: float = 1.0
    floor: int = 1

    def check(self) -> None:
        check_shares(self)
        check_that(self.coactivation >= 0, self, "coactivation", "Use 0 for router columns alone.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks = layers(model)
        for layer in self.floors(model.spec):
            if ROUTER not in block_weights(blocks[layer]):
                raise SpecError(
                    f"ClusterDrop finds no {ROUTER} in layer {layer}: its router has no column per "
                    "expert.",
                    "Drop experts of such routers by a score, with ExpertDrop.",
                )
        return super().outline(model)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return (CoActivation(),) if self.coactivation else ()

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks, floors = layers(model), self.floors(model.spec)
        distances = {i: self._distance(i, blocks[i], stats) for i in floors}
        clusters = clusters_of_all(distances, floors, self.kept(model.spec))
        return {i: _representatives(blocks[i], clusters[i]) for i in floors}

    def _distance(self, layer: int, block: Block, stats: Statistics) -> np.ndarray:
        w_ExD = np.asarray(materialize(block_weights(block)[ROUTER]), np.float64).T
        d_ExE = np.linalg.norm(w_ExD[:, None] - w_ExD[None], axis=-1)
        if self.coactivation:
            together_ExE = np.asarray(stats.of(layer, CoActivation()), np.float64)
            mean = together_ExE[~np.eye(len(w_ExD), dtype=bool)].mean()
            if mean > 0:
                d_ExE = d_ExE - self.coactivation * together_ExE / mean
        return d_ExE


def clusters(d_ExE: np.ndarray, threshold: float, floor: int = 1) -> list[tuple[int, ...]]:
    """Complete linkage: the closest pair of experts first, as long as all distances between the
    clusters that it unites are below the threshold and more than `floor` clusters are left."""
    E = len(d_ExE)
    of: list[tuple[int, ...]] = [(e,) for e in range(E)]  # expert -> its cluster
    pairs = sorted((d_ExE[i, j], i, j) for i in range(E) for j in range(i + 1, E))
    for distance, i, j in pairs:
        if distance >= threshold or len(set(of)) <= floor:
            break
        if of[i] == of[j] or d_ExE[np.ix_(of[i], of[j])].max() >= threshold:
            continue
        for e in (both := tuple(sorted(of[i] + of[j]))):
            of[e] = both
    return sorted(set(of))


def clusters_of_all(
    distances: Mapping[int, np.ndarray], floors: Mapping[int, int], wanted: int
) -> dict[int, list[tuple[int, ...]]]:
    """The clusters of every layer under one threshold that leaves `wanted` of them in all, or, as
    none does, the least number above that bisection finds."""
    values = np.unique(np.concatenate([d[np.triu_indices(len(d), 1)] for d in distances.values()]))
    thresholds = [-np.inf, *(np.nextafter(value, np.inf) for value in values)]

    def cut(place: int) -> dict[int, list[tuple[int, ...]]]:
        at = thresholds[place]
        return {i: clusters(d, at, floors[i]) for i, d in distances.items()}

    low, high = 0, len(thresholds) - 1  # at `low` enough are left, above `high` too few
    found = cut(low)
    while low < high:
        middle = (low + high + 1) // 2
        tried = cut(middle)
        if sum(map(len, tried.values())) >= wanted:
            low, found = middle, tried
        else:
            high = middle - 1
    return found


def _representatives(block: Block, groups: list[tuple[int, ...]]) -> tuple[int, ...]:
    named = block_weights(block)
    stacks = [np.asarray(materialize(named[m])) for m in expert_matrices(block)]
    flat_ExP = np.concatenate([w.reshape(len(w), -1) for w in stacks], axis=1)
    kept = []
    for group in groups:
        members = flat_ExP[list(group)]
        away = np.linalg.norm(members - members.mean(0), axis=1)
        kept.append(group[int(away.argmin())])
    return tuple(sorted(kept))
