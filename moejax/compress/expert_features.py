"""What describes an expert beside the others of its layer: rows that a grouping compares."""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, LayerInputs, LayerStatistics, LogitGram, MeanOutputs
from moejax.compress.block_weights import block_weights
from moejax.core import SpecError, check_that, spec, taps
from moejax.models import Block, hidden_units
from moejax.moe import LinearScores, MoESpec, RouterContext


@runtime_checkable
class ExpertFeatures(Protocol):
    """A row of numbers per stored expert: float [E, P]; near rows mean like experts."""

    def needs(self) -> tuple[Accumulator, ...]: ...

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray: ...


@spec
class OutputFeatures:
    """The mean output of the expert over all tokens, routed to it or not (arXiv:2410.08589).

    Independent of the router, and of the order of hidden units.
    """

    def needs(self) -> tuple[Accumulator, ...]:
        return (MeanOutputs(),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return stats[MeanOutputs.name]


@spec
class OutputGrams:
    """Inner products between the expert's outputs on `tokens` inputs, centred: [E, tokens^2].

    The cosine of two rows is the linear CKA of two experts' outputs (arXiv:1905.00414, eq. 3),
    by which DEK (arXiv:2407.09590) calls experts alike: it asks which inputs an expert tells apart,
    and nothing of the directions in which it answers, nor of the order of hidden units.
    """

    tokens: int = 256

    def check(self) -> None:
        check_that(self.tokens >= 2, self, "tokens", "256 inputs per layer are plenty.")

    def needs(self) -> tuple[Accumulator, ...]:
        return (LayerInputs(tokens=self.tokens),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        x_TxD = jnp.asarray(stats[LayerInputs(tokens=self.tokens).name], jnp.float32)
        graphdef, state = nnx.split(block.moe)
        y_ExTxD = np.asarray(_outputs(graphdef, state, x_TxD), np.float64)
        y_ExTxD -= y_ExTxD.mean(1, keepdims=True)
        return np.einsum("etd,esd->ets", y_ExTxD, y_ExTxD).reshape(len(y_ExTxD), -1)


@spec
class LogitFeatures:
    """The router's logits of the expert over the text, up to a rotation (arXiv:2310.01334).

    Rows with the inner products of the logit vectors: their cosines and distances are the same,
    and E numbers stand for as many as there are tokens. SpecError behind a slot map.
    """

    def needs(self) -> tuple[Accumulator, ...]:
        return (LogitGram(),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        _require_router(self, layer, block)
        gram = np.asarray(stats[LogitGram.name], np.float64)
        if not np.isfinite(gram).all():
            return gram  # the grouping names the expert
        values, vectors = np.linalg.eigh(gram)
        return vectors * np.sqrt(np.maximum(values, 0))


@spec
class RouterRowFeatures:
    """The router's weights of the expert, its column of the kernel. SpecError behind a slot map."""

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        moe = _require_router(self, layer, block)
        if not isinstance(moe.router.scores, LinearScores):
            raise SpecError(
                f"RouterRowFeatures: layer {layer} has {type(moe.router.scores).__name__}, whose "
                "logits are no products with one row per expert.",
                "Group by LogitFeatures or OutputFeatures.",
            )
        kernel_DxE = block_weights(block)["moe.router.scores.kernel"]
        return np.asarray(kernel_DxE, np.float64).T


@spec
class WeightFeatures:
    """All weights of the expert, hidden units in the order in which they are stored."""

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        units_ExFxP = hidden_units(block)
        return units_ExFxP.reshape(len(units_ExFxP), -1)


@functools.partial(jax.jit, static_argnames="graphdef")
def _outputs(graphdef: Any, state: Any, x_TxD: Array) -> Array:
    """What every stored expert makes of every input: [E, T, D]."""
    request = frozenset({taps.ALL_OUTPUT})
    return nnx.merge(graphdef, state)(x_TxD, RouterContext(), request)[2][taps.ALL_OUTPUT]


def _require_router(features: ExpertFeatures, layer: int, block: Block) -> MoESpec:
    """SpecError where router experts are not the stored ones."""
    moe = block.spec.ffn
    assert isinstance(moe, MoESpec)
    if moe.slots is not None:
        raise SpecError(
            f"{type(features).__name__}: layer {layer} has {moe.experts} router experts on "
            f"{moe.stored} stored ones.",
            "Group merged experts by OutputFeatures or WeightFeatures.",
        )
    return moe
