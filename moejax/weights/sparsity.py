"""Patterns of sparsity: which weights of a matrix stay, given how much each counts."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from moejax.core import SpecError, check_that, spec
from moejax.weights.format import Format
from moejax.weights.sparse import pack_nm, pack_sparse


@runtime_checkable
class Pattern(Protocol):
    """How many weights of a matrix stay, and which ones compete; a frozen spec.

    span: inputs of a column that compete among themselves, 0 where all of a matrix do. A matrix
    may be pruned in strips of inputs; a strip is then a matrix of its own, or of one span.
    """

    @property
    def span(self) -> int: ...

    def keep(self, score: Array) -> Array:
        """bool [*lead, K, N]: the weights of highest score, the lower index first among equals."""
        ...

    def pack(self, w: Array, kept: Array, *, strips: int = 1, name: str = "") -> Format:
        """The weights that stay of a matrix kept in so many strips, in a format.

        SpecError, naming the matrix, where none fits.
        """
        ...


@spec
class PerMatrix:
    """`sparsity` of a matrix's weights go, whichever they are, rounded to whole weights."""

    sparsity: float
    span = 0

    def check(self) -> None:
        _check_share(self)

    def keep(self, score: Array) -> Array:
        flat = score.reshape(*score.shape[:-2], -1)
        return _highest(flat, _left(flat.shape[-1], self.sparsity), -1).reshape(score.shape)

    def pack(self, w: Array, kept: Array, *, strips: int = 1, name: str = "") -> Format:
        inputs, columns = w.shape[-2:]
        left = strips * _left(inputs // strips * columns, self.sparsity)
        return pack_sparse(w, kept, left, name)


@spec
class PerOutput:
    """`sparsity` of the inputs of every column go, rounded: Wanda's groups (arXiv:2306.11695)."""

    sparsity: float
    span = 0

    def check(self) -> None:
        _check_share(self)

    def keep(self, score: Array) -> Array:
        return _highest(score, _left(score.shape[-2], self.sparsity), -2)

    def pack(self, w: Array, kept: Array, *, strips: int = 1, name: str = "") -> Format:
        inputs, columns = w.shape[-2:]
        left = strips * _left(inputs // strips, self.sparsity) * columns
        return pack_sparse(w, kept, left, name)


@spec
class NOfM:
    """Of every `m` consecutive inputs of a column `n` stay: N:M sparsity (arXiv:2104.08378)."""

    n: int = 2
    m: int = 4

    def check(self) -> None:
        check_that(1 <= self.m <= 256, self, "m", "2:4 is what GPUs know; m is at most 256.")
        check_that(1 <= self.n <= self.m, self, "n", f"Keep 1 to {self.m} of {self.m} inputs.")

    @property
    def span(self) -> int:
        return self.m

    def keep(self, score: Array) -> Array:
        *lead, inputs, columns = score.shape
        groups = score.reshape(*lead, inputs // self.m, self.m, columns)
        return _highest(groups, self.n, -2).reshape(score.shape)

    def pack(self, w: Array, kept: Array, *, strips: int = 1, name: str = "") -> Format:
        return pack_nm(w, kept, self.n, self.m, name)


def check_pattern(pattern: Pattern, w: Array, name: str = "") -> None:
    """Raises SpecError, naming the matrix, where its inputs fall into no whole groups."""
    inputs = w.shape[-2]
    if pattern.span and inputs % pattern.span:
        of = f" of {name}" if name else ""
        raise SpecError(
            f"groups of {pattern.span} do not divide the {inputs} inputs{of}.",
            "Choose an m that divides them; a pruned or resized matrix may need another.",
            field="m",
        )


def _highest(score: Array, count: int, axis: int) -> Array:
    order = jnp.argsort(-score, axis=axis, stable=True)
    return jnp.argsort(order, axis=axis, stable=True) < count


def _left(weights: int, sparsity: float) -> int:
    """At least one, so that no matrix vanishes."""
    return max(1, weights - math.floor(sparsity * weights + 0.5))


def _check_share(pattern: PerMatrix | PerOutput) -> None:
    fits = 0 <= pattern.sparsity < 1
    check_that(fits, pattern, "sparsity", "Give a share from 0 (keep all) to below 1.")
