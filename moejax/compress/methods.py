"""How a matrix goes onto a grid: by rounding each weight, or so that its outputs stay (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import (
    Accumulator,
    AllTokens,
    ExpertCounts,
    LayerStatistics,
    Routed,
    Rows,
    SecondMoments,
    TokenCount,
)
from moejax.compress.block_weights import EXPERTS
from moejax.compress.passes import MatrixEdit, Weight
from moejax.core import MoejaxError, SpecError, check_that, spec, taps
from moejax.weights import Grid

INPUT_TAPS = {
    "moe.experts.gate": taps.EXPERT_INPUT,
    "moe.experts.up": taps.EXPERT_INPUT,
    "moe.experts.down": taps.EXPERT_HIDDEN,
    "moe.shared.gate": taps.FFN_INPUT,
    "moe.shared.up": taps.FFN_INPUT,
    "moe.shared.down": taps.SHARED_HIDDEN,
    "ffn.gate": taps.FFN_INPUT,
    "ffn.up": taps.FFN_INPUT,
    "ffn.down": taps.FFN_HIDDEN,
    "attention.q": taps.ATTENTION_INPUT,
    "attention.k": taps.ATTENTION_INPUT,
    "attention.v": taps.ATTENTION_INPUT,
    "attention.o": taps.ATTENTION_CONTEXT,
    "attention.q_down": taps.ATTENTION_INPUT,
    "attention.kv_down": taps.ATTENTION_INPUT,
    "attention.q_up": taps.QUERY_LATENT,
    "attention.kv_up": taps.KV_LATENT,
}
"""What each matrix of a block is multiplied with."""

RARE_TAPS = {
    "ffn.gate": taps.DENSE_INPUT,
    "ffn.up": taps.DENSE_INPUT,
    "attention.q": taps.FILTERED_INPUT,
    "attention.k": taps.FILTERED_INPUT,
}
"""The same in the few layers that have these taps; they go before `INPUT_TAPS` there."""


@spec
class FullPrecision:
    """No grid: 16 bits, plain bfloat16. As the only grid it leaves every weight as it is."""

    bits = 16
    group = None

    def __call__(self, w: Array, name: str = "") -> Array:
        return w


Choice = Grid | FullPrecision


@dataclass(frozen=True)
class Quantized:
    """A weight on its grid, and per matrix of its stack (arrays of shape `lead`) what it cost.

    errors as in `runs.LedgerRow`, NaN where not measured; fallback: None where the method was
    followed; calibrated: whether its statistics sufficed.
    """

    weight: Weight
    relative_error: np.ndarray
    output_error: np.ndarray
    nearest_error: np.ndarray
    fallback: np.ndarray
    calibrated: np.ndarray

    def take(self, experts: np.ndarray) -> Quantized:
        """Of some experts of a stack."""
        weight = weights.take(self.weight, jnp.asarray(experts))
        return Quantized(
            weight,
            self.relative_error[experts],
            self.output_error[experts],
            self.nearest_error[experts],
            self.fallback[experts],
            self.calibrated[experts],
        )


@dataclass(frozen=True)
class MatrixInputs:
    """What calibration says of the inputs of a weight [*lead, K, N].

    moments: float32 [*lead, K, K], sums of x x^T; tokens: rows seen, of shape `lead`.
    """

    moments: np.ndarray
    tokens: np.ndarray


def input_needs(matrix: str, rows: Rows, owner: str) -> tuple[Accumulator, ...]:
    """What `matrix_inputs` reads; SpecError, naming the method, for a matrix of unknown inputs."""
    return (*_moments(matrix, rows, owner), ExpertCounts(), TokenCount())


def matrix_inputs(matrix: str, stats: LayerStatistics, rows: Rows, owner: str) -> MatrixInputs:
    """Second moments of the inputs of one matrix of a layer. rows: of an expert's, which count."""
    found = (m.name for m in _moments(matrix, rows, owner) if m.name in stats)
    moments, tokens = stats[next(found)], stats[TokenCount.name]
    if not matrix.startswith(EXPERTS):
        return MatrixInputs(moments[0], tokens)
    counts = stats[ExpertCounts.name]
    if len(counts) != len(moments):
        raise SpecError(
            f"{matrix}: {len(counts)} router experts lead to {len(moments)} stored ones.",
            f"Run {owner} before experts are merged or replicated.",
        )
    seen = np.full(len(moments), tokens) if isinstance(rows, AllTokens) else counts
    return MatrixInputs(moments, seen)


class OfInputs:
    """What methods share that read the second moments of a matrix's inputs.

    rows: of an expert's, which count.
    """

    rows: Rows

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return input_needs(matrix, self.rows, type(self).__name__)

    def inputs(self, matrix: str, stats: LayerStatistics) -> MatrixInputs:
        return matrix_inputs(matrix, stats, self.rows, type(self).__name__)


def _moments(matrix: str, rows: Rows, owner: str) -> tuple[SecondMoments, ...]:
    """Of its inputs; a layer has those of its rare tap or, behind them, the usual ones."""
    if matrix not in INPUT_TAPS:
        raise SpecError(
            f"{owner} knows no inputs of {matrix}.", f"It treats {', '.join(INPUT_TAPS)}."
        )
    usual = SecondMoments(
        tap=INPUT_TAPS[matrix], rows=rows if matrix.startswith(EXPERTS) else Routed()
    )
    return (SecondMoments(tap=RARE_TAPS[matrix]), usual) if matrix in RARE_TAPS else (usual,)


@runtime_checkable
class Method(Protocol):
    """A way onto a grid; a frozen spec."""

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        """The statistics it reads for a matrix ("moe.experts.up")."""
        ...

    def inputs(self, matrix: str, stats: LayerStatistics) -> MatrixInputs | None:
        """Its statistics of one matrix of a layer, None where it reads none."""
        ...

    def __call__(self, w: Array, grid: Choice, inputs: MatrixInputs | None, name: str) -> Quantized:
        """The weight [*lead, K, N] on the grid; `name` is for errors."""
        ...


@spec
class RoundToNearest:
    """Every weight to the nearest point of its grid; no data decides anything."""

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return ()

    def inputs(self, matrix: str, stats: LayerStatistics) -> None:
        return None

    def __call__(self, w: Array, grid: Choice, inputs: MatrixInputs | None, name: str) -> Quantized:
        weight = grid(w, name)
        error = np.asarray(weights.relative_error(w, weight), np.float64)
        unknown = np.full(error.shape, np.nan)
        return Quantized(
            weight, error, unknown, unknown, np.full(error.shape, None), np.full(error.shape, True)
        )


@spec
class GPTQ(OfInputs):
    """Input by input onto the grid, each error made good by the inputs that follow (2210.17323).

    All experts of a layer at once, each with the second moments of its own rows (arXiv:2310.16795).
    rows: which rows count, and how much; `AllTokens` calibrates rare experts on what they never
    see in use. least_tokens: rows per input of a matrix below which an expert is rounded to nearest
    instead, as one whose moments cannot be factorised at any damping is; the ledger counts both.
    act_order, damping: see `weights.gptq`.
    """

    rows: Rows = Routed()
    least_tokens: float = 1.0
    act_order: bool = False
    damping: float = 0.01

    def check(self) -> None:
        check_that(self.least_tokens >= 0, self, "least_tokens", "Use 0 to trust any expert.")
        check_that(self.damping >= 0, self, "damping", "0.01 is usual.")

    def __call__(self, w: Array, grid: Choice, inputs: MatrixInputs | None, name: str) -> Quantized:
        if isinstance(grid, FullPrecision):
            return RoundToNearest()(w, grid, None, name)
        assert inputs is not None
        if not np.isfinite(inputs.moments).all():
            raise MoejaxError(
                f"the second moments of {name} are not finite.",
                "Its inputs overflow: calibrate anew.",
            )
        few = inputs.tokens < self.least_tokens * w.shape[-2]
        # Without information all directions are equal, and GPTQ is round-to-nearest.
        moments = np.where(
            few[..., None, None], np.eye(w.shape[-2], dtype=np.float32), inputs.moments
        )
        found = weights.gptq(
            w,
            jnp.asarray(moments),
            grid,
            act_order=self.act_order,
            damping=self.damping,
            name=name,
        )
        output, nearest = output_errors(w, found.weight, grid(w, name), jnp.asarray(inputs.moments))
        why = np.full(few.shape, None, object)
        why[np.asarray(found.failed)] = "round-to-nearest: no factorisation"
        why[few] = "round-to-nearest: too few tokens"
        return Quantized(
            found.weight,
            np.asarray(weights.relative_error(w, found.weight), np.float64),
            np.asarray(output, np.float64),
            np.asarray(nearest, np.float64),
            why,
            ~few,
        )


@jax.jit
def output_errors(w: Array, by_method: Weight, nearest: Weight, moments: Array) -> tuple:
    """|X (W_new - W)|_F / |X W|_F of both, from X^T X alone; NaN where X W is zero."""

    def energy(d: Array) -> Array:
        return jnp.maximum(jnp.einsum("...kn,...kj,...jn->...", d, moments, d), 0)

    exact = w.astype(jnp.float32)
    whole = energy(exact)
    return tuple(
        jnp.sqrt(jnp.where(whole > 0, energy(weights.materialize(q) - exact) / whole, jnp.nan))
        for q in (by_method, nearest)
    )


def edits(matrix: str, found: Quantized, experts: np.ndarray | None = None) -> list[MatrixEdit]:
    """A `MatrixEdit` for each matrix of a stack, or the one of a single matrix.

    experts: index in the block of each, where they are experts.
    """

    def one(at: tuple, expert: int | None) -> MatrixEdit:
        def number(values: np.ndarray) -> float | None:
            return None if np.isnan(values[at]) else float(values[at])

        reason = found.fallback[at]
        return MatrixEdit(
            matrix,
            expert,
            relative_error=number(found.relative_error),
            output_error=number(found.output_error),
            nearest_error=number(found.nearest_error),
            fallback=None if reason is None else str(reason),
            calibrated=bool(found.calibrated[at]),
        )

    if experts is None:
        return [one((), None)]
    return [one((i,), int(e)) for i, e in enumerate(experts)]
