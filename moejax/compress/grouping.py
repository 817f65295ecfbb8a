"""Which experts of a layer become one: around dominant experts, by hierarchical clustering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from scipy.cluster.hierarchy import linkage

from moejax.calibrate import Accumulator, Statistics
from moejax.compress.expert_features import ExpertFeatures, LogitFeatures, OutputFeatures
from moejax.compress.expert_scores import ExpertScore, Frequency
from moejax.compress.slots import stored_sums
from moejax.core import SpecError, check_that, spec
from moejax.models import Block
from moejax.moe import MoESpec

Groups = dict[int, np.ndarray]
"""Layer -> for each stored expert the one that its group is named after: int [stored]."""


@runtime_checkable
class Grouping(Protocol):
    """Groups of stored experts in every layer.

    groups: how many are left in a layer, in the mean over layers. Bad statistics raise SpecError
    naming layer and expert.
    """

    @property
    def groups(self) -> int: ...

    def needs(self) -> tuple[Accumulator, ...]: ...

    def __call__(self, blocks: Mapping[int, Block], stats: Statistics) -> Groups:
        """blocks: the layers to group, by index."""
        ...


@spec
class DominantExperts:
    """Each group is a dominant expert and those nearest to it (M-SMoE, arXiv:2310.01334, sec. 3.1).

    The experts of highest `score` are dominant: over all layers together, scores divided by their
    layer's sum, so that layers with many experts in use keep more; with `per_layer`, `groups` in
    each. The most used of a layer are always dominant, as many as its router chooses. Every other
    expert joins the dominant one of highest cosine between `features`.
    """

    groups: int
    score: ExpertScore = Frequency()
    features: ExpertFeatures = LogitFeatures()
    per_layer: bool = False

    def check(self) -> None:
        check_that(self.groups >= 1, self, "groups", "Leave at least one expert.")

    def needs(self) -> tuple[Accumulator, ...]:
        return (*self.score.needs(), *self.features.needs())

    def __call__(self, blocks: Mapping[int, Block], stats: Statistics) -> Groups:
        scores = {i: expert_values(self.score, i, b, stats) for i, b in blocks.items()}
        return {
            i: self._joined(i, blocks[i], dominant, stats)
            for i, dominant in self._dominant(blocks, scores).items()
        }

    def _dominant(
        self, blocks: Mapping[int, Block], scores: Mapping[int, np.ndarray]
    ) -> dict[int, np.ndarray]:
        """Layer -> its dominant experts, ascending."""
        order = {i: np.argsort(-score, kind="stable") for i, score in scores.items()}
        if self.per_layer:
            return {i: np.sort(best[: self.groups]) for i, best in order.items()}
        sure = {i: min(_chosen(blocks[i]), self.groups) for i in blocks}
        room = self.groups * len(blocks) - sum(sure.values())
        rest = [
            (-scores[i][e] / max(scores[i].sum(), 1e-30), i, e)
            for i, best in order.items()
            for e in best[sure[i] :]
        ]
        found = {i: list(best[: sure[i]]) for i, best in order.items()}
        for _, i, e in sorted(rest)[:room]:
            found[i].append(e)
        return {i: np.sort(experts) for i, experts in found.items()}

    def _joined(
        self, layer: int, block: Block, dominant: np.ndarray, stats: Statistics
    ) -> np.ndarray:
        feature_ExP = expert_rows(self.features, layer, block, stats)
        unit = feature_ExP / np.maximum(np.linalg.norm(feature_ExP, axis=1, keepdims=True), 1e-30)
        nearest = dominant[np.argmax(unit @ unit[dominant].T, axis=1)]
        nearest[dominant] = dominant
        return nearest


@spec
class HierarchicalClusters:
    """Agglomerative clustering of `features` by Euclidean distance (HC-SMoE, arXiv:2410.08589).

    groups: in every layer. linkage: as scipy's. A group is named after its lowest expert.
    """

    groups: int
    linkage: Literal["average", "complete", "single", "ward", "weighted", "centroid", "median"] = (
        "average"
    )
    features: ExpertFeatures = OutputFeatures()

    def check(self) -> None:
        check_that(self.groups >= 1, self, "groups", "Leave at least one expert.")

    def needs(self) -> tuple[Accumulator, ...]:
        return self.features.needs()

    def __call__(self, blocks: Mapping[int, Block], stats: Statistics) -> Groups:
        return {
            i: self._clusters(expert_rows(self.features, i, block, stats))
            for i, block in blocks.items()
        }

    def _clusters(self, feature_ExP: np.ndarray) -> np.ndarray:
        E = len(feature_ExP)
        if self.groups == E:
            return np.arange(E)
        return unions(linkage(feature_ExP, self.linkage), E, self.groups)


@spec
class RandomGroups:
    """Groups drawn at random: the control that a grouping has to beat."""

    groups: int
    seed: int = 0

    def check(self) -> None:
        check_that(self.groups >= 1, self, "groups", "Leave at least one expert.")
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, blocks: Mapping[int, Block], stats: Statistics) -> Groups:
        found = {}
        for layer, block in blocks.items():
            draw = np.random.default_rng((self.seed, layer))
            order = draw.permutation(stored(block))
            heads, others = order[: self.groups], order[self.groups :]
            label = np.empty(len(order), int)
            label[heads], label[others] = heads, draw.choice(heads, len(others))
            found[layer] = label
        return found


@spec
class GivenGroups:
    """Groups by number, the same in every layer: ((0, 4), (1, 5), ...), each named after its first.

    What a hand, another tool or a planted test decided.
    """

    members: tuple[tuple[int, ...], ...]

    def check(self) -> None:
        experts = sorted(e for group in self.members for e in group)
        whole = experts == list(range(len(experts))) and all(self.members)
        check_that(whole, self, "members", "Put each expert, numbered from 0, into one group.")

    @property
    def groups(self) -> int:
        return len(self.members)

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, blocks: Mapping[int, Block], stats: Statistics) -> Groups:
        label = np.empty(sum(map(len, self.members)), int)
        for group in self.members:
            label[list(group)] = group[0]
        for layer, block in blocks.items():
            if stored(block) != len(label):
                raise SpecError(
                    f"GivenGroups.members has {len(label)} experts, layer {layer} stores "
                    f"{stored(block)}.",
                    "Give groups of the experts that are stored, after earlier passes.",
                    field="members",
                )
        return dict.fromkeys(blocks, label)


def unions(tree: np.ndarray, experts: int, groups: int) -> np.ndarray:
    """Labels by the first experts - groups unions of scipy's tree, of their lowest expert each.

    A cut by height could split or join ties.
    """
    members = [{e} for e in range(experts)]
    first = tree[: experts - groups, :2].astype(int)
    for a, b in first:
        members.append(members[a] | members[b])
    gone = {int(node) for union in first for node in union}
    label = np.empty(experts, int)
    for node in set(range(len(members))) - gone:
        label[list(members[node])] = min(members[node])
    return label


def stored(block: Block) -> int:
    """How many experts a layer stores."""
    assert isinstance(block.spec.ffn, MoESpec)
    return block.spec.ffn.stored


def expert_values(score: ExpertScore, layer: int, block: Block, stats: Statistics) -> np.ndarray:
    """The scores of stored experts, float64 [E]; SpecError naming layer and expert for a NaN."""
    values = np.asarray(score(layer, block, stats.layers[layer]), np.float64)
    assert isinstance(block.spec.ffn, MoESpec)
    if len(values) == block.spec.ffn.experts:
        values = stored_sums(block, values)
    if values is None:
        raise SpecError(
            f"{type(score).__name__}: layer {layer} has several copies of an expert.",
            "Merge experts before they are replicated.",
        )
    _require_finite(score, layer, values[:, None])
    return values


def expert_rows(
    features: ExpertFeatures, layer: int, block: Block, stats: Statistics
) -> np.ndarray:
    """The features of stored experts, float64 [E, P]; SpecError for a NaN, as `expert_values`."""
    rows_ExP = np.asarray(features(layer, block, stats.layers[layer]), np.float64)
    _require_finite(features, layer, rows_ExP)
    return rows_ExP


def _require_finite(source: object, layer: int, rows_ExP: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(rows_ExP).all(axis=1))
    if len(bad):
        raise SpecError(
            f"{type(source).__name__}: expert {bad[0]} of layer {layer} has a similarity that is "
            "no finite number.",
            "Its weights or outputs overflow: calibrate anew, or drop the expert first.",
        )


def _chosen(block: Block) -> int:
    """How many experts a token chooses."""
    assert isinstance(block.spec.ffn, MoESpec)
    return getattr(block.spec.ffn.router.selector, "k", 1)
