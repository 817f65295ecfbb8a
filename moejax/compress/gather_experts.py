"""Routed layers made dense: one feed-forward that gathers what the experts know."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, expert_matrices, with_block_weights
from moejax.compress.gathering import MATRICES, Gathering
from moejax.compress.passes import LayerEdit, MatrixEdit, require_dense
from moejax.core import SpecError, spec
from moejax.models import (
    Block,
    DecoderLM,
    DenseSpec,
    LayerSpec,
    ModelSpec,
    layers,
    parameters,
    with_parameters,
)
from moejax.models.parameters import abstract_block, block_parameters
from moejax.moe import MoESpec
from moejax.runs.ledger import MERGED

SHARED = "moe.shared."
INTO = f"{MERGED} into ffn"


@dataclass(frozen=True)
class _Plan:
    model: ModelSpec
    stats: Statistics


@spec
class GatherExperts:
    """Every MoE layer becomes a dense feed-forward as wide as one expert, made by `gathering`.

    The student of OneS (arXiv:2201.10890) before it is distilled; a `Recover` step does that.
    Shared experts stay: their hidden units stand beside the gathered ones. Everything else is
    copied. SpecError for experts in a format, with biases, gates of several blocks, a gate on
    shared experts, or a dense residual: no dense feed-forward stands for them.
    """

    gathering: Gathering

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks, names = layers(model), []
        if not model.spec.moe_layers:
            raise SpecError("GatherExperts: the model has no experts.", "Choose a MoE model.")
        named = parameters(model)
        changed = list(model.spec.layers)
        for index in model.spec.moe_layers:
            prefix = f"layers.{index}."
            self._check(index, blocks[index], model.spec.width)
            names += [prefix + name for name in expert_matrices(blocks[index])]
            changed[index] = dense_layer(model.spec.layers[index])
            named = {n: w for n, w in named.items() if not n.startswith(prefix + "moe.")}
            shapes = block_parameters(abstract_block(changed[index], model.spec))
            named |= {prefix + n: w for n, w in shapes.items() if n.startswith("ffn.")}
        spec = dataclasses.replace(model.spec, layers=tuple(changed))
        return with_parameters(spec, named), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.gathering.needs()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: there are no experts left."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> _Plan:
        return _Plan(model.spec, stats)

    def apply_layer(
        self, index: int, block: Block, plan: _Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if not isinstance(block.spec.ffn, MoESpec):
            return LayerEdit(block)
        old = block_parameters(block)
        gathered = self.gathering(index, block, plan.stats, key)
        axes = {"gate": 1, "up": 1, "down": 0}
        named = {n: w for n, w in old.items() if not n.startswith("moe.")}
        for name in MATRICES:
            parts = [gathered[name].astype(old[EXPERTS + name].dtype)]
            if SHARED + name in old:
                parts.append(old[SHARED + name])
            named[f"ffn.{name}"] = jnp.concatenate(parts, axis=axes[name])
        dense = abstract_block(dense_layer(block.spec), plan.model)
        dense = with_block_weights(dense, named)
        edits = [
            MatrixEdit(name, expert, lineage=(INTO,))
            for name in expert_matrices(block)
            for expert in range(block.spec.ffn.stored)
        ]
        edits += [MatrixEdit(f"ffn.{name}", None) for name in MATRICES]
        return LayerEdit(dense, tuple(edits), experts=())

    def _check(self, index: int, block: Block, inputs: int) -> None:
        """SpecError for a layer that no dense feed-forward stands for."""
        moe = block.spec.ffn
        assert isinstance(moe, MoESpec)
        for name, weight in block_parameters(block).items():
            if name.startswith(EXPERTS) or name.startswith(SHARED):
                require_dense(weight, f"layers.{index}.{name}")
        reasons = {
            "experts with biases": moe.expert_bias,
            "gates of several blocks": moe.activation.gate_blocks != 1,
            "a gate on its shared experts": moe.shared_gate is not None,
            "a dense residual": block.spec.dense_residual is not None,
        }
        for reason, has in reasons.items():
            if has:
                raise SpecError(
                    f"GatherExperts: layer {index} has {reason}.",
                    "Merge experts behind a slot map instead.",
                )
        if objection := self.gathering.objection(moe.stored, moe.width, inputs):
            raise SpecError(
                f"GatherExperts.gathering cannot treat layer {index}.", objection, field="gathering"
            )


def dense_layer(layer: LayerSpec) -> LayerSpec:
    """The layer with one dense feed-forward in the place of its experts."""
    moe = layer.ffn
    assert isinstance(moe, MoESpec)
    dense = DenseSpec(width=moe.width + moe.shared_width, activation=moe.activation)
    return dataclasses.replace(layer, ffn=dense)
