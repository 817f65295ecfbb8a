"""Groups of experts that are most alike among themselves, found as a partition of a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.cluster.hierarchy import linkage

from moejax.calibrate import Accumulator, Statistics
from moejax.compress.expert_features import ExpertFeatures, OutputGrams
from moejax.compress.grouping import Groups, expert_rows, unions
from moejax.core import check_that, spec
from moejax.models import Block


@spec
class SimilarGroups:
    """A partition of the graph of experts that keeps most similarity inside (DEK, 2407.09590).

    Maximises the sum over groups g of sum_{i < j in g} s_ij / |g|, s the cosines of `features`,
    from average linkage on by moving one expert or exchanging two as long as that gains: a local
    maximum, the same for equal statistics. Without the division one large group would hold most.
    groups: in every layer. A group is named after its lowest expert.
    """

    groups: int
    features: ExpertFeatures = OutputGrams()

    def check(self) -> None:
        check_that(self.groups >= 1, self, "groups", "Leave at least one expert.")

    def needs(self) -> tuple[Accumulator, ...]:
        return self.features.needs()

    def __call__(self, blocks: Mapping[int, Block], stats: Statistics) -> Groups:
        found = {}
        for index, block in blocks.items():
            rows_ExP = expert_rows(self.features, index, block, stats)
            size_Ex1 = np.linalg.norm(rows_ExP, axis=1, keepdims=True)
            unit_ExP = rows_ExP / np.maximum(size_Ex1, 1e-30)
            found[index] = self._partition(unit_ExP @ unit_ExP.T)
        return found

    def _partition(self, s_ExE: np.ndarray) -> np.ndarray:
        E = len(s_ExE)
        if self.groups >= E:
            return np.arange(E)
        apart = (1 - s_ExE)[np.triu_indices(E, 1)]
        label = unions(linkage(np.maximum(apart, 0), "average"), E, self.groups)
        while (better := _improved(s_ExE, label)) is not None:
            label = better
        return np.array([np.flatnonzero(label == name)[0] for name in label])


def kept_inside(s_ExE: np.ndarray, label_E: np.ndarray) -> float:
    """sum over groups of sum_{i < j} s_ij / |g|."""
    total = 0.0
    for name in np.unique(label_E):
        members = np.flatnonzero(label_E == name)
        inside = s_ExE[np.ix_(members, members)]
        total += (inside.sum() - np.trace(inside)) / 2 / len(members)
    return total


def _improved(s_ExE: np.ndarray, label_E: np.ndarray) -> np.ndarray | None:
    """The best partition one move or exchange away; None where none gains. No group is emptied."""
    best, found = kept_inside(s_ExE, label_E) + 1e-12, None
    for near in _neighbours(label_E):
        value = kept_inside(s_ExE, near)
        if value > best:
            best, found = value, near
    return found


def _neighbours(label_E: np.ndarray) -> list[np.ndarray]:
    found = []
    for i, own in enumerate(label_E):
        if (label_E == own).sum() > 1:
            for name in np.unique(label_E):
                if name != own:
                    near = label_E.copy()
                    near[i] = name
                    found.append(near)
        for j in range(i):
            if label_E[j] != own:
                near = label_E.copy()
                near[[i, j]] = near[[j, i]]
                found.append(near)
    return found
