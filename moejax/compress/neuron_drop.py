"""Hidden neurons that go: structured pruning inside experts (GRIFFIN, arXiv:2404.01365)."""

from __future__ import annotations

import functools
import math
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, NeuronNorms, Statistics
from moejax.compress.block_weights import block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit
from moejax.core import check_that, spec
from moejax.models import Block, DecoderLM, ModelSpec, layers, select_neurons, with_layers
from moejax.moe import MoESpec

Plan = dict[int, np.ndarray]  # layer -> neurons that stay, [E, N], ascending


@runtime_checkable
class NeuronScore(Protocol):
    """A number per expert and hidden neuron: float64 [E, F]; [1, F] of a dense feed-forward."""

    def needs(self) -> tuple[Accumulator, ...]: ...

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray: ...


@spec
class NormalisedActivations:
    """GRIFFIN's s_j = || z_j / ||z||_2 ||_2 over the tokens of the text, z the hidden activation.

    Of a prompt alone it is the neurons that the prompt uses, which is what the paper selects by.
    """

    def needs(self) -> tuple[Accumulator, ...]:
        return (NeuronNorms(),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return np.sqrt(stats[NeuronNorms().name])


@spec
class NeuronMagnitude:
    """||gate_j||_2 ||up_j||_2, whatever the text: the paper's static control."""

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        gate, up, _ = _matrices(block)
        norms = [np.linalg.norm(np.asarray(w, np.float64), axis=-2) for w in (gate, up)]
        return np.atleast_2d(norms[0] * norms[1])


@spec
class RandomNeurons:
    """A fixed random order: the control that a score has to beat."""

    seed: int = 0

    def check(self) -> None:
        """Seeds count from 0."""
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return np.random.default_rng((self.seed, layer)).random(_neurons(block))


@spec
class NeuronDrop:
    """Every expert, or dense feed-forward, loses its hidden neurons of lowest score.

    fraction: the share that goes, rounded to whole neurons, the higher index first among equals;
    each expert chooses its own, and all keep as many. Calibrated on a prompt, what it makes is the
    `after_prompt` of `models.generate`: GRIFFIN. Shared experts stay whole.
    """

    fraction: float = 0.5
    score: NeuronScore = NormalisedActivations()

    def check(self) -> None:
        fix = "Give a share from 0 (keep all) to below 1."
        check_that(0 <= self.fraction < 1, self, "fraction", fix)

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks, names = layers(model), []
        for layer in self._layers(model.spec):
            experts, neurons = _neurons(blocks[layer])
            first = np.tile(np.arange(self._kept(neurons)), (experts, 1))
            narrow = functools.partial(select_neurons, index_ExN=first)
            blocks[layer] = nnx.eval_shape(narrow, blocks[layer])
            names += [f"layers.{layer}.{name}" for name in _names(blocks[layer])]
        return with_layers(model, blocks), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: experts put out something else."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        blocks, plan = layers(model), {}
        for layer in self._layers(model.spec):
            score_ExF = self.score(layer, blocks[layer], stats.layers[layer])
            order = np.argsort(-score_ExF, axis=1, kind="stable")
            plan[layer] = np.sort(order[:, : self._kept(score_ExF.shape[1])], axis=1)
        return plan

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        of = f"{plan[index].shape[1]} of {_neurons(block)[1]} neurons"
        routed = isinstance(block.spec.ffn, MoESpec)
        experts = range(len(plan[index])) if routed else (None,)
        edits = (MatrixEdit(m, e, lineage=(of,)) for m in _names(block) for e in experts)
        return LayerEdit(select_neurons(block, plan[index]), tuple(edits))

    def _layers(self, model: ModelSpec) -> tuple[int, ...]:
        found = tuple(i for i, layer in enumerate(model.layers) if layer.ffn is not None)
        check_that(len(found) > 0, self, "fraction", "The model has no feed-forwards.")
        return found

    def _kept(self, neurons: int) -> int:
        return max(1, neurons - math.floor(self.fraction * neurons + 0.5))


def _names(block: Block) -> tuple[str, ...]:
    prefix = "moe.experts" if isinstance(block.spec.ffn, MoESpec) else "ffn"
    return tuple(f"{prefix}.{matrix}" for matrix in ("gate", "up", "down"))


def _matrices(block: Block) -> list[Array | jax.ShapeDtypeStruct]:
    named = block_weights(block)
    return [named[name] for name in _names(block)]


def _neurons(block: Block) -> tuple[int, int]:
    """(E, F); E is 1 for a dense feed-forward."""
    down = _matrices(block)[2]
    return (down.shape[0] if len(down.shape) == 3 else 1), down.shape[-2]
