"""How a matrix is taken apart at a given rank: SVDs, and codes or rows with factors."""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Routed, Rows
from moejax.compress.methods import (
    MatrixInputs,
    OfInputs,
    Quantized,
    output_errors,
)
from moejax.compress.passes import Weight
from moejax.core import MoejaxError, check_that, spec
from moejax.weights import Grid, LowRank

Stored = Literal["bfloat16", "float16", "float32"]
_FEW = "plain SVD: too few tokens"


@runtime_checkable
class Factorisation(Protocol):
    """A way to a weight of given rank; a frozen spec. least_rank: the smallest that it can do."""

    @property
    def least_rank(self) -> int: ...

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        """The statistics it reads for a matrix ("moe.experts.up")."""
        ...

    def inputs(self, matrix: str, stats: LayerStatistics) -> MatrixInputs | None:
        """Its statistics of one matrix of a layer, None where it reads none."""
        ...

    def shapes(self, w: Any, rank: int, name: str) -> Any:
        """What w [*lead, K, N] becomes, as ShapeDtypeStructs; SpecError where it cannot."""
        ...

    def __call__(self, w: Array, rank: int, inputs: MatrixInputs | None, name: str) -> Quantized:
        """The weight [*lead, K, N] at that rank; `name` is for errors."""
        ...


@spec
class PlainSVD:
    """The truncated SVD: nearest in Frobenius norm, without data.

    stored: dtype of the factors. A matrix whose rank is no larger loses what rounding to it loses.
    """

    stored: Stored = "bfloat16"

    @property
    def least_rank(self) -> int:
        return 1

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return ()

    def inputs(self, matrix: str, stats: LayerStatistics) -> None:
        return None

    def shapes(self, w: Any, rank: int, name: str) -> LowRank:
        return _shapes(w, rank, self.stored, name)

    def __call__(self, w: Array, rank: int, inputs: MatrixInputs | None, name: str) -> Quantized:
        return measured(w, weights.truncated_svd(w, rank, self.stored, name))


@spec
class WhitenedSVD(OfInputs):
    """SVD-LLM (arXiv:2403.07378): the least error of the outputs on the calibration rows.

    rows: which rows count, and how much. least_tokens: rows per input of a matrix below which an
    expert gets the plain SVD instead, which the ledger counts. damping: see
    `weights.whitened_svd`. stored: dtype of the factors.
    """

    rows: Rows = Routed()
    least_tokens: float = 1.0
    damping: float = 1e-8
    stored: Stored = "bfloat16"

    def check(self) -> None:
        check_that(self.least_tokens >= 0, self, "least_tokens", "Use 0 to trust any expert.")
        check_that(self.damping >= 0, self, "damping", "1e-8 is usual.")

    @property
    def least_rank(self) -> int:
        return 1

    def shapes(self, w: Any, rank: int, name: str) -> LowRank:
        return _shapes(w, rank, self.stored, name)

    def __call__(self, w: Array, rank: int, inputs: MatrixInputs | None, name: str) -> Quantized:
        assert inputs is not None
        few = np.asarray(inputs.tokens < self.least_tokens * w.shape[-2])
        moments = np.where(few[..., None, None], np.eye(w.shape[-2]), inputs.moments)
        pair = weights.whitened_svd(
            w, moments, rank, damping=self.damping, dtype=self.stored, name=name
        )
        return measured(w, pair, inputs, few)


@spec
class ActivationScaledSVD(OfInputs):
    """ASVD (arXiv:2312.05821): the SVD of diag(s) w, s_k the size of input k to the power alpha.

    The paper takes the mean of |x_k| (or its maximum); this the root of the mean square, which the
    second moments hold. The other fields are those of `WhitenedSVD`.
    """

    alpha: float = 0.5
    rows: Rows = Routed()
    least_tokens: float = 1.0
    stored: Stored = "bfloat16"

    def check(self) -> None:
        check_that(self.alpha >= 0, self, "alpha", "0.5 is the paper's; 0 is the plain SVD.")
        check_that(self.least_tokens >= 0, self, "least_tokens", "Use 0 to trust any expert.")

    @property
    def least_rank(self) -> int:
        return 1

    def shapes(self, w: Any, rank: int, name: str) -> LowRank:
        return _shapes(w, rank, self.stored, name)

    def __call__(self, w: Array, rank: int, inputs: MatrixInputs | None, name: str) -> Quantized:
        assert inputs is not None
        _require_finite(inputs, name)
        few = np.asarray(inputs.tokens < self.least_tokens * w.shape[-2])
        square = np.diagonal(inputs.moments, axis1=-2, axis2=-1)
        size = np.maximum(square, 0) / np.maximum(inputs.tokens, 1)[..., None]
        scale = np.where(few[..., None], 1.0, size ** (self.alpha / 2))
        pair = weights.scaled_svd(w, scale, rank, dtype=self.stored, name=name)
        return measured(w, pair, inputs, few)


@spec
class CompensatedGrid:
    """MiLo (arXiv:2504.02658): codes on `grid` plus low-rank factors, fitted in turn, without data.

    factors: the grid of the factors, 3 bits in the paper, along the long side of each; None stores
    them in float16. iterations: after the first pass; 10 in the released code. The best iterate
    counts, factors as they are stored (`weights.compensated`). At rank 0 a matrix has codes alone.
    """

    grid: Grid
    factors: Grid | None = None
    iterations: int = 10

    def check(self) -> None:
        check_that(self.iterations >= 0, self, "iterations", "10 is usual; 0 fits once.")

    @property
    def least_rank(self) -> int:
        return 0

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return ()

    def inputs(self, matrix: str, stats: LayerStatistics) -> None:
        return None

    def shapes(self, w: Any, rank: int, name: str) -> Any:
        return weights.compensated_shapes(
            w, self.grid, rank, factors=self.factors, dtype=jnp.float16, name=name
        )

    def __call__(self, w: Array, rank: int, inputs: MatrixInputs | None, name: str) -> Quantized:
        found = weights.compensated(
            w, self.grid, rank, factors=self.factors, iterations=self.iterations, name=name
        )
        return measured(w, found.weight)


@spec
class LowRankAndRows(OfInputs):
    """Factors plus the rows of what they leave over that count most (LoSparse, arXiv:2306.11222).

    w = u v + S, where S is kept in a share `rows_kept` of the input channels, those of largest
    importance, and is zero elsewhere: structured sparsity, stored as those channels of w, exact in
    bfloat16 (`weights.RowPatch`). The importance of channel k is |S_k|^2 times its mean square
    input, what dropping it alone costs; the paper learns it from |w dL/dw| while it fine-tunes.
    The other fields are those of `WhitenedSVD`.
    """

    rows_kept: float
    rows: Rows = Routed()
    least_tokens: float = 1.0
    stored: Stored = "bfloat16"

    def check(self) -> None:
        fits = 0 < self.rows_kept <= 1
        check_that(fits, self, "rows_kept", "Keep a share above 0 and at most 1.")
        check_that(self.least_tokens >= 0, self, "least_tokens", "Use 0 to trust any expert.")

    @property
    def least_rank(self) -> int:
        return 1

    def shapes(self, w: Any, rank: int, name: str) -> weights.RowPatch:
        pair = _shapes(w, rank, self.stored, name)
        index = jax.ShapeDtypeStruct((*w.shape[:-2], self._count(w.shape[-2])), jnp.uint16)
        rows = jax.ShapeDtypeStruct((*index.shape, w.shape[-1]), jnp.bfloat16)
        return jax.eval_shape(weights.patch_rows, pair, index, rows)

    def __call__(self, w: Array, rank: int, inputs: MatrixInputs | None, name: str) -> Quantized:
        assert inputs is not None
        _require_finite(inputs, name)
        few = np.asarray(inputs.tokens < self.least_tokens * w.shape[-2])
        square = np.diagonal(inputs.moments, axis1=-2, axis2=-1)
        pair = weights.truncated_svd(w, rank, self.stored, name)
        left = np.asarray(w, np.float64) - np.asarray(weights.materialize(pair), np.float64)
        importance = (left**2).sum(-1) * np.where(few[..., None], 1.0, square)
        index = np.argsort(-importance, axis=-1, kind="stable")[..., : self._count(w.shape[-2])]
        index = jnp.asarray(np.sort(index, axis=-1))
        rows = jnp.take_along_axis(jnp.asarray(w), index[..., None], axis=-2)
        return measured(w, weights.patch_rows(pair, index, rows), inputs, few)

    def _count(self, inputs: int) -> int:
        return max(1, round(self.rows_kept * inputs))


def measured(
    w: Array, weight: Weight, inputs: MatrixInputs | None = None, few: np.ndarray | None = None
) -> Quantized:
    """The weight with its errors. few: where the statistics did not do, and were not followed."""
    error = np.asarray(weights.relative_error(w, weight), np.float64)
    output = np.full(error.shape, np.nan)
    if inputs is not None:
        moments = jnp.asarray(inputs.moments)
        output = np.asarray(output_errors(w, weight, weight, moments)[0], np.float64)
    few = np.zeros(error.shape, bool) if few is None else few
    why = np.full(few.shape, None, object)
    why[few] = _FEW
    return Quantized(weight, error, output, np.full(error.shape, np.nan), why, ~few)


def _require_finite(inputs: MatrixInputs, name: str) -> None:
    if not np.isfinite(inputs.moments).all():
        raise MoejaxError(
            f"the second moments of {name} are not finite.", "Its inputs overflow: calibrate anew."
        )


def _shapes(w: Any, rank: int, stored: Stored, name: str) -> LowRank:
    svd = functools.partial(weights.truncated_svd, rank=rank, dtype=stored, name=name)
    return jax.eval_shape(svd, w)
