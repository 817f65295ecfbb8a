"""Experts that tokens skip at run time (arXiv:2402.14800; ODP of MC-MoE, arXiv:2410.06270)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, GateRatios, LayerStatistics, Statistics, quantile
from moejax.compress.passes import LayerEdit
from moejax.core import SpecError, check_that, spec
from moejax.models import Block, DecoderLM, ModelSpec, layers, with_layers, with_rule
from moejax.moe import MoESpec, SkipSmallGates

Plan = dict[int, float]  # layer -> beta


@spec
class DynamicSkip:
    """Tokens skip their experts of small gates: `SkipSmallGates`, its beta from calibration.

    beta of a layer is the `quantile` of g_(2) / g_(1) over the calibration tokens: at the median
    half of them lose their second expert. With a protection in `rule` it is ODP. No weight changes.
    layers: which layers, None for all with experts; SpecError for one that chooses one expert only.
    """

    quantile: float = 0.5
    layers: tuple[int, ...] | None = None
    rule: SkipSmallGates = SkipSmallGates()

    def check(self) -> None:
        check_that(0 <= self.quantile <= 1, self, "quantile", "The papers use the median, 0.5.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks = layers(model)
        for index in self._chosen(model.spec):
            add = functools.partial(with_rule, rule=self.rule, tables=self.rule.init())
            blocks[index] = nnx.eval_shape(add, blocks[index])
        return with_layers(model, blocks), ()

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return (GateRatios(),)

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: experts see fewer tokens, later layers other inputs."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        return {
            index: quantile(stats.of(index, GateRatios()), self.quantile)
            for index in self._chosen(model.spec)
        }

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        return LayerEdit(with_rule(block, self.rule, {"beta": jnp.float32(plan[index])}))

    def _chosen(self, model: ModelSpec) -> tuple[int, ...]:
        chosen = model.moe_layers if self.layers is None else self.layers
        unknown = set(chosen) - set(model.moe_layers)
        fix = f"The layers with experts are {', '.join(map(str, model.moe_layers)) or 'none'}."
        check_that(not unknown and len(chosen) > 0, self, "layers", fix)
        for index in chosen:
            ffn = model.layers[index].ffn
            assert isinstance(ffn, MoESpec)
            if getattr(ffn.router.selector, "k", 1) < 2:
                raise SpecError(
                    f"layer {index} chooses one expert per token: there is none to skip.",
                    "Skip in layers whose router chooses two experts or more.",
                    field="layers",
                )
        return chosen
