"""Which weights of a matrix go: the smallest, those that move its outputs least, or SparseGPT's."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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
from moejax.weights import Pattern


@runtime_checkable
class PruningMethod(Protocol):
    """A way to a pattern of sparsity; a frozen spec."""

    def strips(self, pattern: Pattern, inputs: int) -> int:
        """In how many strips of inputs a matrix is pruned; each keeps its share."""
        ...

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        """The statistics it reads for a matrix ("moe.experts.up")."""
        ...

    def inputs(self, matrix: str, stats: LayerStatistics) -> MatrixInputs | None:
        """Its statistics of one matrix of a layer, None where it reads none."""
        ...

    def __call__(
        self, w: Array, pattern: Pattern, inputs: MatrixInputs | None, name: str
    ) -> Quantized:
        """The weight [*lead, K, N] pruned; `name` is for errors."""
        ...


@spec
class Magnitude:
    """The smallest |w| go."""

    def strips(self, pattern: Pattern, inputs: int) -> int:
        return 1

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return ()

    def inputs(self, matrix: str, stats: LayerStatistics) -> None:
        return None

    def __call__(
        self, w: Array, pattern: Pattern, inputs: MatrixInputs | None, name: str
    ) -> Quantized:
        pruned = _by_score(w, jnp.abs(w), pattern, name)
        error = np.asarray(weights.relative_error(w, pruned), np.float64)
        unknown = np.full(error.shape, np.nan)
        return Quantized(
            pruned, error, unknown, unknown, np.full(error.shape, None), np.full(error.shape, True)
        )


@spec
class Wanda(OfInputs):
    """The smallest |w_kn| ||X_k|| go, X_k the k-th input over the rows seen (arXiv:2306.11695).

    With `rows=GateWeighted()` it is MoE-Pruner (arXiv:2410.12013): every row counts times the gate
    that its token has for the expert. Wanda compares within an output: `PerOutput`, or `NOfM`.
    An expert that no row reached is pruned by magnitude; the ledger counts it.
    """

    rows: Rows = Routed()

    def strips(self, pattern: Pattern, inputs: int) -> int:
        return 1

    def __call__(
        self, w: Array, pattern: Pattern, inputs: MatrixInputs | None, name: str
    ) -> Quantized:
        assert inputs is not None
        _require_finite(inputs, name)
        unseen = np.asarray(inputs.tokens) == 0
        energy = np.where(unseen[..., None], 1, np.diagonal(inputs.moments, axis1=-2, axis2=-1))
        norm = jnp.sqrt(jnp.asarray(energy, jnp.float32))[..., None]
        pruned = _by_score(w, jnp.abs(w) * norm, pattern, name)
        return _measured(w, pruned, pattern, inputs, unseen, "magnitude: no tokens", name)


@spec
class SparseGPT(OfInputs):
    """Input by input, each loss made good by the inputs that follow: see `weights.sparse_gpt`.

    least_tokens: rows per input of a matrix below which an expert is pruned by magnitude instead;
    the ledger counts it. block: inputs whose weights are chosen at once; 128 is the paper's.
    """

    rows: Rows = Routed()
    least_tokens: float = 1.0
    damping: float = 0.01
    block: int = 128

    def check(self) -> None:
        check_that(self.least_tokens >= 0, self, "least_tokens", "Use 0 to trust any expert.")
        check_that(self.damping >= 0, self, "damping", "0.01 is usual.")
        check_that(self.block >= 1, self, "block", "128 is usual.")

    def strips(self, pattern: Pattern, inputs: int) -> int:
        return inputs // weights.strip_length(pattern, inputs, self.block)

    def __call__(
        self, w: Array, pattern: Pattern, inputs: MatrixInputs | None, name: str
    ) -> Quantized:
        assert inputs is not None
        _require_finite(inputs, name)
        few = np.asarray(inputs.tokens < self.least_tokens * w.shape[-2])
        # Without information all directions are equal, and SparseGPT is magnitude pruning.
        moments = np.where(
            few[..., None, None], np.eye(w.shape[-2], dtype=np.float32), inputs.moments
        )
        found = weights.sparse_gpt(
            w, jnp.asarray(moments), pattern, damping=self.damping, block=self.block, name=name
        )
        why = "magnitude: too few tokens"
        pruned = _measured(w, found.weight, pattern, inputs, few, why, name)
        pruned.fallback[np.asarray(found.failed)] = "magnitude: no factorisation"
        return pruned


def _by_score(w: Array, score: Array, pattern: Pattern, name: str) -> Weight:
    weights.check_pattern(pattern, w, name)
    return pattern.pack(w, pattern.keep(score), name=name)


def _measured(
    w: Array,
    pruned: Weight,
    pattern: Pattern,
    inputs: MatrixInputs,
    few: np.ndarray,
    why: str,
    name: str,
) -> Quantized:
    """nearest_error: what magnitude pruning to the same pattern loses."""
    smallest = _by_score(w, jnp.abs(w), pattern, name)
    output, nearest = output_errors(w, pruned, smallest, jnp.asarray(inputs.moments))
    fallback = np.full(few.shape, None, object)
    fallback[few] = why
    return Quantized(
        pruned,
        np.asarray(weights.relative_error(w, pruned), np.float64),
        np.asarray(output, np.float64),
        np.asarray(nearest, np.float64),
        fallback,
        ~few,
    )


def _require_finite(inputs: MatrixInputs, name: str) -> None:
    if not np.isfinite(inputs.moments).all():
        raise MoejaxError(
            f"the second moments of {name} are not finite.",
            "Its inputs overflow: calibrate anew.",
        )
