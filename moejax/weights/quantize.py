"""Round-to-nearest on uniform and logarithmic grids (MoQE, arXiv:2310.02410).

Every grid splits K into groups of inputs, one scale per group and output column. The scale is
rounded to the dtype in which it is stored before any code is computed, so that |w - w^| is at most
half a stored step. Pure and batched over leading axes; jit-able.

Scales are float16. Below its normal range (6e-5) a scale is rounded up, so that no code is cut off
and the error stays below half a step, at most 3e-8; an all-zero group stores scale 1 and is exact.
Above its range, and for NaN or infinite weights, known values raise SpecError; under jit, where
values are not known, the scale becomes infinite or NaN and so does everything after it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer

from moejax.core import SpecError, check_that, spec
from moejax.weights.codebook import Codebook, pack_codebook
from moejax.weights.packed import Packed, check_group, check_packable, grouped, pack

_SMALLEST_NORMAL = 2.0**-14  # of float16


@spec
class SymmetricGrid:
    """w = (code - 2**(bits-1)) * scale, scale = max|w| / (2**(bits-1) - 1) of each group (MoQE).

    group: inputs per scale; None for one scale per output column.
    """

    bits: int
    group: int | None

    def check(self) -> None:
        """2 to 8 bits: at one bit the largest code is zero."""
        check_that(2 <= self.bits <= 8, self, "bits", "Choose 2 to 8.")
        _check_group(self)

    def scales(self, w: Array) -> tuple[Array, None]:
        """float16 scale [..., 1, N] of one group w [..., group, N] per leading index; no zero."""
        largest = jnp.abs(w.astype(jnp.float32)).max(-2, keepdims=True)
        return _stored(largest / (2 ** (self.bits - 1) - 1)), None

    def codes(self, w: Array, scale: Array, zero: Array | None = None) -> Array:
        """uint8 codes of w [..., group, N] on the grid of its scale [..., 1, N]."""
        centre = 2 ** (self.bits - 1)
        steps = jnp.round(w.astype(jnp.float32) / scale.astype(jnp.float32))
        return (jnp.clip(steps, -centre, centre - 1) + centre).astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Array | None = None) -> Array:
        """float32 weights that the codes stand for."""
        centre = 2 ** (self.bits - 1)
        return (codes.astype(jnp.float32) - centre) * scale.astype(jnp.float32)

    def pack(self, codes: Array, scale: Array, zero: Array | None = None) -> Packed:
        """The format of codes [*lead, K, N] and scale [*lead, K / group, N]."""
        return pack(codes, scale, None, self.bits, self.group or codes.shape[-2])

    def __call__(self, w: Array, name: str = "") -> Packed:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return _round_to_nearest(self, w, name)


@spec
class AsymmetricGrid:
    """w = (code - zero) * scale, from the smallest to the largest weight of each group, and zero.

    The range always holds 0, so that the integer zero fits in uint8 and 0 is exact.
    group: inputs per scale; None for one scale per output column.
    """

    bits: int
    group: int | None

    def check(self) -> None:
        """1 to 8 bits."""
        check_that(1 <= self.bits <= 8, self, "bits", "Choose 1 to 8.")
        _check_group(self)

    def scales(self, w: Array) -> tuple[Array, Array]:
        """float16 scale and uint8 zero [..., 1, N] of one group w [..., group, N]."""
        w = w.astype(jnp.float32)
        low = jnp.minimum(w.min(-2, keepdims=True), 0)
        high = jnp.maximum(w.max(-2, keepdims=True), 0)
        top = 2**self.bits - 1
        # Divided before the difference, which may overflow.
        scale = _stored(high / top - low / top)
        zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, top)
        return scale, zero.astype(jnp.uint8)

    def codes(self, w: Array, scale: Array, zero: Array) -> Array:
        """uint8 codes of w [..., group, N] on the grid of its scale and zero [..., 1, N]."""
        steps = jnp.round(w.astype(jnp.float32) / scale.astype(jnp.float32))
        shifted = steps + zero.astype(jnp.float32)
        return jnp.clip(shifted, 0, 2**self.bits - 1).astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Array) -> Array:
        """float32 weights that the codes stand for."""
        steps = codes.astype(jnp.float32) - zero.astype(jnp.float32)
        return steps * scale.astype(jnp.float32)

    def pack(self, codes: Array, scale: Array, zero: Array) -> Packed:
        """The format of codes [*lead, K, N] and scale, zero [*lead, K / group, N]."""
        return pack(codes, scale, zero, self.bits, self.group or codes.shape[-2])

    def __call__(self, w: Array, name: str = "") -> Packed:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return _round_to_nearest(self, w, name)


@spec
class Log2Grid:
    """w = sign * 2**-j * scale, j = round(-log2|w / scale|) in [0, 2**(bits-1)) (MoQE).

    The scale of a group is the best in squared error of `candidates` between half and one and a
    half times max|w|. There is no zero among the levels; an all-zero group has scale zero.
    group: inputs per scale; None for one scale per output column.
    """

    bits: int
    group: int | None
    candidates: int = 16

    def check(self) -> None:
        """2 to 6 bits: beyond, the smallest levels are below float32."""
        check_that(2 <= self.bits <= 6, self, "bits", "Choose 2 to 6.")
        check_that(self.candidates >= 1, self, "candidates", "Try at least one.")
        _check_group(self)

    def levels(self) -> Array:
        """float32 [2**bits]: the positive levels 1, 1/2, ..., then the negative ones."""
        positive = 2.0 ** -jnp.arange(2 ** (self.bits - 1), dtype=jnp.float32)
        return jnp.concatenate([positive, -positive])

    def scales(self, w: Array) -> tuple[Array, None]:
        """float16 scale [..., 1, N] of one group w [..., group, N]; no zero."""
        w = w.astype(jnp.float32)
        largest = jnp.abs(w).max(-2, keepdims=True)
        unit = jnp.where(largest > 0, largest, 1)

        def error(scale: Array) -> Array:
            near = self.values(self.codes(w, scale), scale)
            return jnp.square((near - w) / unit).sum(-2, keepdims=True)

        def better(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            scale = _stored(largest * (0.5 + (i + 0.5) / self.candidates), empty=0.0)
            worse = error(scale)
            keep = worse < best[1]
            return jnp.where(keep, scale, best[0]), jnp.where(keep, worse, best[1])

        first = _stored(largest, empty=0.0)
        return lax.fori_loop(0, self.candidates, better, (first, error(first)))[0], None

    def codes(self, w: Array, scale: Array, zero: Array | None = None) -> Array:
        """uint8 codes: the exponent j, plus 2**(bits-1) for a negative weight."""
        half = 2 ** (self.bits - 1)
        scale = scale.astype(jnp.float32)
        ratio = jnp.abs(w.astype(jnp.float32)) / jnp.where(scale > 0, scale, 1)
        # Below the smallest level there is nothing to distinguish, and log2(0) to avoid.
        exponent = jnp.round(-jnp.log2(jnp.maximum(ratio, 2.0**-half)))
        codes = jnp.clip(exponent, 0, half - 1) + half * (w < 0)
        return codes.astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Array | None = None) -> Array:
        """float32 weights that the codes stand for."""
        half = 2 ** (self.bits - 1)
        exponent = (codes % half).astype(jnp.float32)
        magnitude = jnp.exp2(-exponent) * scale.astype(jnp.float32)
        return jnp.where(codes < half, magnitude, -magnitude)

    def pack(self, codes: Array, scale: Array, zero: Array | None = None) -> Codebook:
        """The format of codes [*lead, K, N] and scale [*lead, K / group, N]."""
        levels = jnp.broadcast_to(self.levels(), (*codes.shape[:-2], 2**self.bits))
        return pack_codebook(codes, scale, levels, self.bits, self.group or codes.shape[-2])

    def __call__(self, w: Array, name: str = "") -> Codebook:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return _round_to_nearest(self, w, name)


Grid = SymmetricGrid | AsymmetricGrid | Log2Grid


def _round_to_nearest(grid: Grid, w: Array, name: str) -> Any:
    check_group(w.shape[-2], grid.group or w.shape[-2], name)
    check_packable(w.shape[-2], grid.bits, name)
    weight = _quantized(grid, w)
    require_finite(weight.scale, name)
    return weight


@partial(jax.jit, static_argnames="grid")
def _quantized(grid: Any, w: Array) -> Packed | Codebook:
    *lead, inputs, columns = w.shape
    w = grouped(w, grid.group or inputs)
    scale, zero = grid.scales(w)
    codes = grid.codes(w, scale, zero)
    scale = scale.reshape(*lead, -1, columns)
    zero = None if zero is None else zero.reshape(scale.shape)
    return grid.pack(codes.reshape(*lead, inputs, columns), scale, zero)


def require_finite(scale: Array, name: str = "") -> None:
    """Raises SpecError, naming the matrix, if a known scale is NaN or infinite."""
    if isinstance(scale, Tracer) or bool(jnp.isfinite(scale).all()):
        return
    of = f" of {name}" if name else ""
    raise SpecError(
        f"a scale{of} is not finite: the weights hold NaN, infinity or values above 65504.",
        "Check the weights; train or load them again, or rescale the matrix.",
    )


def _stored(scale: Array, empty: float = 1.0) -> Array:
    """The scale as float16; upwards where it is subnormal, `empty` where it is zero."""
    stored = scale.astype(jnp.float16)
    short = (scale < _SMALLEST_NORMAL) & (stored.astype(jnp.float32) < scale)
    stored = jnp.where(short, jnp.nextafter(stored, jnp.float16(jnp.inf)), stored)
    return jnp.where(scale == 0, jnp.float16(empty), stored)


def _check_group(grid: Grid) -> None:
    fix = "Choose the inputs per scale, or None for one scale per column."
    check_that(grid.group is None or grid.group >= 1, grid, "group", fix)
