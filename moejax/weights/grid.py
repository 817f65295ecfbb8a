"""What a grid is: the levels that weights are rounded to, and round-to-nearest on any of them.

Every grid splits K into groups of inputs, one scale per group and output column. The scale is
rounded to the dtype in which it is stored before any code is computed, so that |w - w^| is measured
on the model that is saved. Pure and batched over leading axes; jit-able.

Scales are float16. Below its normal range (6e-5) a scale is rounded up, so that no code is cut off
and the error stays below half a step, at most 3e-8; an all-zero group stores scale 1 and is exact.
Above its range, and for NaN or infinite weights, known values raise SpecError; under jit, where
values are not known, the scale becomes infinite or NaN and so does everything after it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from moejax.core import SpecError, check_that
from moejax.weights.format import Format
from moejax.weights.packed import check_group, check_packable, grouped

_SMALLEST_NORMAL = 2.0**-14  # of float16


@runtime_checkable
class Grid(Protocol):
    """A quantizer: a frozen spec whose methods turn weights into codes and back.

    bits: of one code. group: inputs per scale; None for one scale per output column.
    `codes` takes the level nearest to each weight, for given scales, by itself: GPTQ calls it row
    by row. A zero is None on grids without one.
    """

    @property
    def bits(self) -> int: ...

    if TYPE_CHECKING:  # a spec's type check would take `group = None` for a missing member

        @property
        def group(self) -> int | None: ...

    def scales(self, w: Array) -> tuple[Array, Array | None]:
        """Scale and zero [..., 1, N] of one group w [..., group, N] per leading index."""
        ...

    def codes(self, w: Array, scale: Array, zero: Any) -> Array:
        """uint8 codes of w [..., rows, N] on the grid of its scale and zero [..., 1, N]."""
        ...

    def values(self, codes: Array, scale: Array, zero: Any) -> Array:
        """float32 weights that the codes stand for."""
        ...

    def pack(self, codes: Array, scale: Array, zero: Any) -> Format:
        """The format of codes [*lead, K, N] and scale, zero [*lead, K / group, N]."""
        ...

    def __call__(self, w: Array, name: str = "") -> Format:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        ...


class Rounded(NamedTuple):
    """Codes [*lead, K, N] with the scale, and perhaps the zero, [*lead, K / group, N] of each."""

    codes: Array
    scale: Array
    zero: Array | None


def round_to_nearest(grid: Grid, w: Array, name: str) -> Any:
    """w [*lead, K, N] on the grid, every weight at its nearest level.

    Raises SpecError, naming the matrix, if the grid does not fit K or a scale is not finite.
    """
    check_fits(grid, w, name)
    weight = _packed(grid, w)
    require_finite(weight, name)
    return weight


@partial(jax.jit, static_argnames="grid")
def nearest(grid: Any, w: Array) -> Rounded:
    """Round-to-nearest of w [*lead, K, N], not packed."""
    *lead, inputs, columns = w.shape
    w = grouped(w, grid.group or inputs)
    scale, zero = grid.scales(w)
    codes = grid.codes(w, scale, zero)
    scale = scale.reshape(*lead, -1, columns)
    zero = None if zero is None else zero.reshape(scale.shape)
    return Rounded(codes.reshape(*lead, inputs, columns), scale, zero)


@partial(jax.jit, static_argnames="grid")
def _packed(grid: Any, w: Array) -> Any:
    return grid.pack(*nearest(grid, w))


def check_fits(grid: Grid, w: Array, name: str) -> None:
    """Raises SpecError, naming the matrix, unless groups and codes fill w [*lead, K, N]."""
    check_group(w.shape[-2], grid.group or w.shape[-2], name)
    check_packable(w.shape[-2], grid.bits, name)


def require_finite(weight: Format, name: str = "") -> None:
    """Raises SpecError, naming the matrix, if a known scale or zero is NaN or infinite."""
    leaves = [a for a in jax.tree.leaves(weight) if jnp.issubdtype(a.dtype, jnp.floating)]
    known = not any(isinstance(a, Tracer) for a in leaves)
    if not known or all(bool(jnp.isfinite(a).all()) for a in leaves):
        return
    of = f" of {name}" if name else ""
    raise SpecError(
        f"a scale{of} is not finite: the weights hold NaN, infinity or values above 65504.",
        "Check the weights; train or load them again, or rescale the matrix.",
    )


def stored(scale: Array, empty: float = 1.0) -> Array:
    """The scale as float16; upwards where it is subnormal, `empty` where it is zero."""
    half = scale.astype(jnp.float16)
    short = (scale < _SMALLEST_NORMAL) & (half.astype(jnp.float32) < scale)
    half = jnp.where(short, jnp.nextafter(half, jnp.float16(jnp.inf)), half)
    return jnp.where(scale == 0, jnp.float16(empty), half)


def squared_error(grid: Any, w: Array, scale: Array, zero: Array | None) -> Array:
    """sum((w - w^)^2) / max|w|^2 of each group w [..., group, N]: [..., 1, N].

    Relative to the largest weight, so that squares neither underflow nor overflow.
    """
    largest = jnp.abs(w).max(-2, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)
    near = grid.values(grid.codes(w, scale, zero), scale, zero)
    return jnp.square((near - w) / unit).sum(-2, keepdims=True)


def check_grid_group(grid: Grid) -> None:
    """Raises SpecError unless a grid's group is None or positive."""
    fix = "Choose the inputs per scale, or None for one scale per column."
    check_that(grid.group is None or grid.group >= 1, grid, "group", fix)
