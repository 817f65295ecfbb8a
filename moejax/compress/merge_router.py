"""Router rows of merged experts made one: the slot map goes, the router is as small as the bank."""

from __future__ import annotations

import functools

import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.expert_scores import ExpertScore
from moejax.compress.passes import LayerEdit
from moejax.core import SpecError, compat, spec
from moejax.models import Block, DecoderLM, ModelSpec, layers, merge_router, with_layers
from moejax.moe import MoESpec

Plan = dict[int, np.ndarray]  # layer -> mix_GxE


@spec
class MergeRouter:
    """Each merged expert gets one router row, the mean of its members' (DEK, arXiv:2407.09590).

    Behind `MergeExperts`. A slot map lets a token that chose two members have their sum; here the
    router chooses k among the merged experts. weighting: what a member's row counts; None for the
    plain mean, and in groups where every weight is 0. The ledger gets no rows.
    SpecError where a layer has no slot map, or its router has no rows of single experts.
    """

    weighting: ExpertScore | None = None

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks = layers(model)
        if not model.spec.moe_layers:
            raise SpecError("MergeRouter: the model has no experts.", "Choose a MoE model.")
        for index in model.spec.moe_layers:
            moe = blocks[index].spec.ffn
            assert isinstance(moe, MoESpec)
            if moe.slots is None or moe.slots.copies > 1:
                raise SpecError(
                    f"MergeRouter: layer {index} has "
                    f"{'no slot map' if moe.slots is None else 'several copies of an expert'}.",
                    "Put MergeExperts before it, and replicas after it.",
                )
            label_E = np.minimum(np.arange(moe.experts), moe.stored - 1)
            merge = functools.partial(merge_router, mix_GxE=_mix(label_E, np.ones(moe.experts)))
            blocks[index] = nnx.eval_shape(merge, blocks[index])
        return with_layers(model, blocks), ()

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return () if self.weighting is None else self.weighting.needs()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: tokens go to other experts."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks = layers(model)
        return {index: self._mix_of(index, blocks[index], stats) for index in model.spec.moe_layers}

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        return LayerEdit(merge_router(block, plan[index]) if index in plan else block)

    def _mix_of(self, index: int, block: Block, stats: Statistics) -> np.ndarray:
        moe = block.spec.ffn
        assert isinstance(moe, MoESpec) and block.moe is not None and block.moe.slots is not None
        slot_E = np.asarray(compat.read(block.moe.slots["slot"]))[:, 0]
        if self.weighting is None:
            return _mix(slot_E, np.ones(moe.experts))
        value_E = np.asarray(self.weighting(index, block, stats.layers[index]), np.float64)
        if value_E.shape != (moe.experts,) or not np.isfinite(value_E).all() or value_E.min() < 0:
            raise SpecError(
                f"MergeRouter.weighting gives layer {index} the weights {value_E.tolist()}.",
                f"Weigh by one number of 0 and more for each of {moe.experts} router experts.",
                field="weighting",
            )
        total_G = np.bincount(slot_E, weights=value_E)
        return _mix(slot_E, np.where(total_G[slot_E] > 0, value_E, 1.0))


def _mix(slot_E: np.ndarray, weight_E: np.ndarray) -> np.ndarray:
    """Weighted means of the rows that lead to each stored expert: [G, E], sums of 1."""
    of_GxE = (slot_E == np.arange(slot_E.max() + 1)[:, None]) * weight_E
    return of_GxE / of_GxE.sum(1, keepdims=True)
