"""The subset of experts that reproduces a layer's output best (NAEE, arXiv:2402.14800)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, LayerInputs, LayerStatistics, Statistics
from moejax.compress.expert_drop import (
    DropsExperts,
    kept_experts,
    outlined,
    routed_part,
    with_experts,
)
from moejax.compress.passes import LayerEdit
from moejax.compress.subset_search import ExhaustiveSubsets, SubsetSearch
from moejax.core import MoejaxError, SpecError, check_that, spec, taps
from moejax.models import Block, DecoderLM, ModelSpec, layers
from moejax.moe import RouterContext

Targets = dict[int, np.ndarray]  # layer -> its output Z [T, D] in the model before the pass
_ALL = frozenset({taps.ALL_OUTPUT})


@spec
class SubsetDrop(DropsExperts):
    """Per layer, the experts whose subset S minimises ||Z - Y_S||_F on `tokens` inputs.

    Z is what the layer puts out in the model before the pass, Y_S what it does if its router
    chooses among S alone. Alone it is NAEE's layer-wise pruning; under `Sequential` the inputs of
    Y_S come through the layers already pruned, Z stays: its progressive pruning. The released code
    adds up a norm per calibration batch, this is one norm over all tokens.
    fraction: as in `ExpertDrop`, one number. SpecError where fewer experts would be left than are
    chosen, or `search` cannot try so many subsets.
    """

    fraction: float
    search: SubsetSearch = ExhaustiveSubsets()
    tokens: int = 2048

    def check(self) -> None:
        fix = "Give a share from 0 (keep all) to below 1."
        check_that(0 <= self.fraction < 1, self, "fraction", fix)
        check_that(self.tokens >= 1, self, "tokens", "2048 inputs per layer are usual.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        check_that(len(model.spec.moe_layers) > 0, self, "fraction", "The model has no experts.")
        kept = {i: self._kept(i, model.spec) for i in model.spec.moe_layers}
        for layer, count in kept.items():
            moe = routed_part(model.spec.layers[layer])
            self.search.check_size(moe.experts, count, layer)
            selector = moe.router.selector
            if selector.keeping(range(count), moe.experts) != selector:
                raise SpecError(
                    f"SubsetDrop cannot try subsets of layer {layer}: {selector} would be another "
                    "one for each.",
                    "Drop experts of a group-limited router by a score, with ExpertDrop.",
                )
        return outlined(model, kept)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return (self._inputs,)

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return (self._inputs,)

    def decide(self, stats: Statistics, model: DecoderLM) -> Targets:
        blocks = layers(model)
        return {
            layer: np.asarray(_outputs(*_split(blocks[layer]), stats.of(layer, self._inputs))[0])
            for layer in model.spec.moe_layers
        }

    def apply_layer(
        self, index: int, block: Block, plan: Targets, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        moe = routed_part(block.spec)
        loss = SubsetLoss(block, stats[self._inputs.name], plan[index], index)
        kept = kept_experts(self, self.fraction, moe, index)
        return with_experts(block, self.search(loss, moe.experts, kept, index))

    @property
    def _inputs(self) -> LayerInputs:
        return LayerInputs(tokens=self.tokens)

    def _kept(self, layer: int, model: ModelSpec) -> int:
        return kept_experts(self, self.fraction, routed_part(model.layers[layer]), layer)


class SubsetLoss:
    """||Z - Y_S||_F of subsets S [N, r] of a layer's experts: float64 [N].

    Every expert runs once on all of x_TxD; a subset then costs its routing and a gather. Rules and
    capacities of the layer are left out. Raises MoejaxError where a loss is not finite.
    """

    at_once = 256  # subsets per program, filled up with repeats

    def __init__(self, block: Block, x_TxD: np.ndarray, z_TxD: np.ndarray, layer: int):
        self.layer = layer
        self._router = nnx.split(_moe(block).router)
        self._x_TxD = jnp.asarray(x_TxD)
        _, y_ExTxD, shared_TxD = _outputs(*_split(block), self._x_TxD)
        self._y_ExTxD, self._rest_TxD = y_ExTxD, jnp.asarray(z_TxD) - shared_TxD

    def __call__(self, subsets_NxR: np.ndarray) -> np.ndarray:
        found = []
        for first in range(0, len(subsets_NxR), self.at_once):
            part = np.asarray(subsets_NxR[first : first + self.at_once], np.int32)
            filled = np.resize(part, (self.at_once, part.shape[1]))
            losses = _losses(*self._router, self._x_TxD, self._y_ExTxD, self._rest_TxD, filled)
            found.append(np.asarray(losses, np.float64)[: len(part)])
        losses_N = np.concatenate(found)
        if not np.isfinite(losses_N).all():
            raise MoejaxError(
                f"the loss of a subset of the experts of layer {self.layer} is not finite.",
                "The layer overflows on the calibration text: check its weights.",
            )
        return losses_N


def _moe(block: Block) -> Any:
    assert block.moe is not None
    return block.moe


def _split(block: Block) -> tuple[Any, Any]:
    return nnx.split(_moe(block))


@functools.partial(jax.jit, static_argnames="graphdef")
def _outputs(graphdef: Any, state: Any, x_TxD: Array) -> tuple[Array, Array, Array]:
    """What the layer puts out, [E, T, D] what each expert does, and the shared experts' part."""
    moe = nnx.merge(graphdef, state)
    y_TxD, _, found = moe(x_TxD, RouterContext(), _ALL)
    shared_TxD = jnp.zeros_like(y_TxD) if moe.shared is None else moe.shared_output(x_TxD)[0]
    return y_TxD, found[taps.ALL_OUTPUT], shared_TxD


@functools.partial(jax.jit, static_argnames="graphdef")
def _losses(
    graphdef: Any, state: Any, x_TxD: Array, y_ExTxD: Array, rest_TxD: Array, subsets_NxR: Array
) -> Array:
    token_Tx1 = jnp.arange(x_TxD.shape[0])[:, None]

    def loss(subset_R: Array) -> Array:
        # Variables of the loop's own: those outside belong to another trace.
        router = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        router.take(subset_R)
        routing = router(x_TxD, RouterContext())
        expert_TxK = subset_R[routing.expert_A].reshape(x_TxD.shape[0], -1)
        gate_TxK = routing.gate_A.reshape(expert_TxK.shape)
        y_TxD = jnp.einsum("tk,tkd->td", gate_TxK, y_ExTxD[expert_TxK, token_Tx1])
        return jnp.linalg.norm(rest_TxD - y_TxD)

    return jax.lax.map(loss, subsets_NxR)
