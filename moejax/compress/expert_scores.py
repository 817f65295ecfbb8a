"""How much an expert counts: scores that decide which experts a layer keeps, or keeps precise."""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax import weights
from moejax.calibrate import (
    Accumulator,
    ExpertCounts,
    GateMass,
    LayerInputs,
    LayerStatistics,
    SoftCounts,
)
from moejax.compress.block_weights import block_weights, expert_matrices
from moejax.compress.methods import Choice
from moejax.compress.routed_error import routed_errors
from moejax.core import SpecError, check_that, spec
from moejax.core.taps import NOTHING
from moejax.models import Block
from moejax.moe import MoESpec, RouterContext


@runtime_checkable
class ExpertScore(Protocol):
    """A number per expert of a layer; experts of low score go first."""

    def needs(self) -> tuple[Accumulator, ...]: ...

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray: ...


@spec
class Frequency:
    """How many tokens were routed to the expert (arXiv:2404.05089)."""

    def needs(self) -> tuple[Accumulator, ...]:
        return (ExpertCounts(),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return stats[ExpertCounts().name]


@spec
class Rarity:
    """The reverse of `Frequency`: the least used expert counts most. A control."""

    def needs(self) -> tuple[Accumulator, ...]:
        return (ExpertCounts(),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        counts_E = stats[ExpertCounts().name]
        return counts_E.max() - counts_E


@spec
class GateMassScore:
    """The sum of the gate weights that the expert received."""

    def needs(self) -> tuple[Accumulator, ...]:
        return (GateMass(),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return stats[GateMass().name]


@spec
class MeanProbability:
    """The router's probability of the expert, mean over all tokens (arXiv:2406.02500).

    The sum, to be exact, which orders the experts of a layer alike.
    """

    def needs(self) -> tuple[Accumulator, ...]:
        return (SoftCounts(),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return stats[SoftCounts().name]


@spec
class RandomScore:
    """A fixed random order per layer: the control that a score has to beat."""

    seed: int = 0

    def check(self) -> None:
        """Seeds count from 0."""
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return np.random.default_rng((self.seed, layer)).random(_spec(block).stored)


@spec
class OutlierScore:
    """max over inputs k of max_n |w[k, n]| / mean_n |w[k, n]|, the most of its matrices.

    QuantMoE-Bench, arXiv:2406.08155: weights that stand out are what few bits lose.
    """

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return np.max([np.asarray(_outliers(w), np.float64) for w in _matrices(block)], axis=0)


@spec
class KurtosisScore:
    """E (w - mean)^4 / variance^2, the mean over the expert's matrices; 3 of normal weights.

    MiLo, arXiv:2504.02658, asks it how heavy the tails of a matrix are.
    """

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        return np.mean([np.asarray(_kurtosis(w), np.float64) for w in _matrices(block)], axis=0)


@spec
class LeaveOneOut:
    """||Y - Y without the expert||_F on `tokens` inputs of the layer, its tokens rerouted.

    The router chooses and weighs among the others as if its logit were minus infinity; so a drop
    of this one expert costs exactly this (NAEE, arXiv:2402.14800, one expert at a time).
    """

    tokens: int = 2048

    def check(self) -> None:
        check_that(self.tokens >= 1, self, "tokens", "2048 inputs per layer are usual.")

    def needs(self) -> tuple[Accumulator, ...]:
        return (LayerInputs(tokens=self.tokens),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        moe = _spec(block)
        k = getattr(moe.router.selector, "k", 1)
        if moe.slots is not None or moe.experts <= k:
            raise SpecError(
                f"LeaveOneOut cannot spare one of {moe.experts} experts in layer {layer}, of which "
                f"{k} are chosen, {'without' if moe.slots is None else 'behind'} a slot map.",
                "Score experts before they are merged, and where more are left than chosen.",
            )
        selector = moe.router.selector
        if selector.keeping(range(1, moe.experts), moe.experts) != selector:
            raise SpecError(
                f"LeaveOneOut cannot spare one of the experts in layer {layer}: {selector} would "
                "be another one without it.",
                "Score experts of a group-limited router by another score.",
            )
        x_TxD = jnp.asarray(stats[LayerInputs(tokens=self.tokens).name], jnp.float32)
        graphdef, state = nnx.split(block.moe)
        whole_TxD = _output(graphdef, state, x_TxD)
        lost = [_lost(graphdef, state, x_TxD, whole_TxD, e) for e in range(moe.experts)]
        return np.asarray(jnp.stack(lost), np.float64)


@spec
class RoutedErrorScore:
    """What the layer's output loses when the expert alone goes onto `grid` (`routed_errors`).

    An expert that none of `tokens` inputs reaches loses nothing.
    """

    grid: Choice
    tokens: int = 2048

    def check(self) -> None:
        check_that(self.tokens >= 1, self, "tokens", "2048 inputs per layer are usual.")

    def needs(self) -> tuple[Accumulator, ...]:
        return (LayerInputs(tokens=self.tokens),)

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        x_TxD = stats[LayerInputs(tokens=self.tokens).name]
        return routed_errors(block, x_TxD, (self.grid,), layer=layer)[0][:, 0]


def _spec(block: Block) -> MoESpec:
    assert isinstance(block.spec.ffn, MoESpec)
    return block.spec.ffn


def _matrices(block: Block) -> list[Array]:
    named = block_weights(block)
    return [weights.materialize(named[name]) for name in expert_matrices(block)]


@jax.jit
def _outliers(w_ExKxN: Array) -> Array:
    size = jnp.abs(w_ExKxN)
    mean_ExK = size.mean(-1)
    ratio_ExK = size.max(-1) / jnp.where(mean_ExK > 0, mean_ExK, 1)
    return ratio_ExK.max(-1)


@jax.jit
def _kurtosis(w_ExKxN: Array) -> Array:
    away = w_ExKxN - w_ExKxN.mean((-2, -1), keepdims=True)
    deviation_E = jnp.sqrt(jnp.square(away).mean((-2, -1), keepdims=True))
    unit = away / jnp.where(deviation_E > 0, deviation_E, 1)
    return (unit**4).mean((-2, -1))


@functools.partial(jax.jit, static_argnames="graphdef")
def _output(graphdef: Any, state: Any, x_TxD: Array) -> Array:
    return nnx.merge(graphdef, state)(x_TxD, RouterContext(), NOTHING)[0]


@functools.partial(jax.jit, static_argnames="graphdef")
def _lost(graphdef: Any, state: Any, x_TxD: Array, whole_TxD: Array, e: Any) -> Array:
    """The router loses its column of expert e; the bank stays, so that e may be traced."""
    moe = nnx.merge(graphdef, state)
    others = jnp.arange(moe.spec.experts - 1)
    kept = others + (others >= e)
    moe.router.take(kept)
    routing = moe.router(x_TxD, RouterContext())
    plan = moe.spec.dispatch.plan(routing, kept[routing.expert_A], moe.spec.stored)
    rows_RxD, _ = moe.experts(plan.scatter(x_TxD), plan.group_sizes_E, NOTHING)
    y_TxD = plan.gather(rows_RxD)
    if moe.shared is not None:
        y_TxD = y_TxD + moe.shared_output(x_TxD)[0]
    return jnp.linalg.norm(whole_TxD - y_TxD)
