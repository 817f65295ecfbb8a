"""Experts merged into fewer stored ones behind a slot map; the router stays as it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import block_weights, expert_matrices
from moejax.compress.expert_scores import ExpertScore, Frequency
from moejax.compress.grouping import Grouping, expert_values, stored
from moejax.compress.passes import LayerEdit, MatrixEdit, require_dense
from moejax.core import SpecError, spec
from moejax.models import (
    Block,
    DecoderLM,
    ModelSpec,
    hidden_units,
    layers,
    merge_experts,
    permute_hidden,
    with_layers,
)
from moejax.moe import MoESpec
from moejax.weights import align

PLAIN_MEAN = "plain mean: no token reached the group"


@runtime_checkable
class Alignment(Protocol):
    """In which order hidden units of merged experts are: order_ExF for `models.permute_hidden`."""

    def __call__(self, block: Block, groups: tuple[np.ndarray, ...]) -> np.ndarray: ...


@spec
class AsStored:
    """Hidden units stay in the order in which they are."""

    def __call__(self, block: Block, groups: tuple[np.ndarray, ...]) -> np.ndarray:
        E, F, _ = hidden_units(block).shape
        return np.tile(np.arange(F), (E, 1))


@spec
class AlignedByWeights:
    """The hidden units of each expert, assigned to those of the lowest expert of its group.

    By linear assignment on all weights of a unit (MC-SMoE, arXiv:2310.01334, section 3.1; the
    released code aligns to the lowest expert, not the dominant one).
    """

    def __call__(self, block: Block, groups: tuple[np.ndarray, ...]) -> np.ndarray:
        units_ExFxP = hidden_units(block)
        order_ExF = AsStored()(block, groups)
        for members in groups:
            for expert in members[1:]:
                order_ExF[expert] = align(units_ExFxP[expert], units_ExFxP[members[0]])
        return order_ExF


@spec
class EqualWeights:
    """All experts count the same: their plain mean, as a weighting."""

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return np.ones(stored(block))


@dataclass(frozen=True)
class _Merge:
    """group_E: the stored expert that each is merged into, which the group is named after;
    weight_E: what each counts, summing to one in a group; unused: groups that no token reached."""

    group_E: np.ndarray
    weight_E: np.ndarray
    unused: frozenset[int]


@spec
class MergeExperts:
    """One expert for each group: the mean of its members, weighed by `weighting`.

    W = sum_e f_e W_e / sum_e f_e for every matrix and bias; the router is untouched, its choices
    are led to the merged experts by a slot map. M-SMoE (arXiv:2310.01334) is this with
    `DominantExperts`, HC-SMoE (arXiv:2410.08589) with `HierarchicalClusters`. A group that no token
    reached is merged by the plain mean; the ledger says so, and what merged with what.
    SpecError where fewer groups than the router's k, or more than there are experts, are asked for,
    or experts are stored in a format already. Where groups are shared out over layers, the plan
    shows the mean in every layer.
    """

    grouping: Grouping
    weighting: ExpertScore = Frequency()
    alignment: Alignment = AsStored()

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks, names = layers(model), []
        groups = self.grouping.groups
        if not model.spec.moe_layers:
            raise SpecError("MergeExperts: the model has no experts.", "Choose a MoE model.")
        for index in model.spec.moe_layers:
            self._check(index, blocks[index])
            E = stored(blocks[index])
            named = [f"layers.{index}.{name}" for name in expert_matrices(blocks[index])]
            names += named
            label, mix = np.minimum(np.arange(E), groups - 1), np.ones((groups, E))
            merge = functools.partial(merge_experts, group_E=label, mix_GxE=mix)
            blocks[index] = nnx.eval_shape(merge, blocks[index])
        return with_layers(model, blocks), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return tuple(dict.fromkeys((*self.grouping.needs(), *self.weighting.needs())))

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: experts change, and so what later layers see."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> dict[int, _Merge]:
        blocks = layers(model)
        chosen = {index: blocks[index] for index in model.spec.moe_layers}
        for index, block in chosen.items():
            self._check(index, block)  # an earlier pass may have shared experts out over layers
        return {
            index: self._weighed(index, chosen[index], group_E, stats)
            for index, group_E in self.grouping(chosen, stats).items()
        }

    def apply_layer(
        self,
        index: int,
        block: Block,
        plan: dict[int, _Merge],
        stats: LayerStatistics,
        key: Array,
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        merge = plan[index]
        names, label_E = np.unique(merge.group_E, return_inverse=True)
        members = tuple(np.flatnonzero(label_E == g) for g in range(len(names)))
        aligned = permute_hidden(block, self.alignment(block, members))
        mix_GxE = (label_E == np.arange(len(names))[:, None]) * merge.weight_E
        merged = merge_experts(aligned, label_E, mix_GxE)
        before, after = block_weights(aligned), block_weights(merged)
        edits = []
        for name in expert_matrices(block):
            error_E = weights.relative_error(before[name], after[name][label_E])
            edits += [
                MatrixEdit(
                    name,
                    expert,
                    relative_error=float(error_E[expert]),
                    fallback=PLAIN_MEAN if int(group) in merge.unused else None,
                )
                for expert, group in enumerate(merge.group_E)
            ]
        kept = tuple(int(e) for e in names)
        into = tuple(int(e) for e in merge.group_E)
        return LayerEdit(merged, tuple(edits), experts=kept, merged_into=into)

    def _check(self, index: int, block: Block) -> None:
        """SpecError for a layer that cannot be merged so."""
        moe = block.spec.ffn
        assert isinstance(moe, MoESpec)
        for name in expert_matrices(block):
            try:
                require_dense(block_weights(block)[name], f"layers.{index}.{name}")
            except SpecError as error:
                fix = "Merge experts before a pass changes their format."
                raise SpecError(f"MergeExperts: {error.problem}", fix) from error
        k = getattr(moe.router.selector, "k", 1)
        groups = self.grouping.groups
        if not k <= groups <= moe.stored:
            raise SpecError(
                f"MergeExperts.grouping.groups = {groups} in layer {index}, which stores "
                f"{moe.stored} experts and sends each token to k = {k}.",
                f"Give {k} to {moe.stored}; GatherExperts makes one dense feed-forward of a layer.",
                field="grouping",
            )

    def _weighed(self, index: int, block: Block, group_E: np.ndarray, stats: Statistics) -> _Merge:
        value_E = expert_values(self.weighting, index, block, stats)
        if (value_E < 0).any():
            expert = int(np.flatnonzero(value_E < 0)[0])
            raise SpecError(
                f"MergeExperts.weighting gives expert {expert} of layer {index} the weight "
                f"{value_E[expert]:g}.",
                "Weigh by a score of 0 and more: Frequency, GateMassScore, EqualWeights.",
                field="weighting",
            )
        total_E = np.zeros(len(group_E))
        np.add.at(total_E, group_E, value_E)
        size_E = np.bincount(group_E, minlength=len(group_E))
        unused = (size_E > 0) & (total_E == 0)
        weight_E = np.where(
            unused[group_E], 1 / size_E[group_E], value_E / np.maximum(total_E[group_E], 1e-300)
        )
        return _Merge(group_E, weight_E, frozenset(np.flatnonzero(unused).tolist()))
