"""Grids between the extremes of each group: uniform and logarithmic (MoQE, arXiv:2310.02410)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moejax.core import check_that, spec
from moejax.weights.codebook import Codebook, pack_codebook
from moejax.weights.grid import check_grid_group, round_to_nearest, squared_error, stored
from moejax.weights.packed import Packed, pack


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
        check_grid_group(self)

    def scales(self, w: Array) -> tuple[Array, None]:
        """float16 scale [..., 1, N] of one group w [..., group, N] per leading index; no zero."""
        largest = jnp.abs(w.astype(jnp.float32)).max(-2, keepdims=True)
        return stored(largest / (2 ** (self.bits - 1) - 1)), None

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
        return round_to_nearest(self, w, name)


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
        check_grid_group(self)

    def scales(self, w: Array) -> tuple[Array, Array]:
        """float16 scale and uint8 zero [..., 1, N] of one group w [..., group, N]."""
        w = w.astype(jnp.float32)
        low = jnp.minimum(w.min(-2, keepdims=True), 0)
        high = jnp.maximum(w.max(-2, keepdims=True), 0)
        top = 2**self.bits - 1
        # Divided before the difference, which may overflow.
        scale = stored(high / top - low / top)
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
        return round_to_nearest(self, w, name)


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
        check_grid_group(self)

    def levels(self) -> Array:
        """float32 [2**bits]: the positive levels 1, 1/2, ..., then the negative ones."""
        positive = np.ldexp(np.float32(1), -np.arange(2 ** (self.bits - 1)))
        return jnp.concatenate([positive, -positive])

    def scales(self, w: Array) -> tuple[Array, None]:
        """float16 scale [..., 1, N] of one group w [..., group, N]; no zero."""
        w = w.astype(jnp.float32)
        largest = jnp.abs(w).max(-2, keepdims=True)

        def better(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            scale = stored(largest * (0.5 + (i + 0.5) / self.candidates), empty=0.0)
            error = squared_error(self, w, scale, None)
            keep = error < best[1]
            return jnp.where(keep, scale, best[0]), jnp.where(keep, error, best[1])

        first = stored(largest, empty=0.0)
        start = (first, squared_error(self, w, first, None))
        return lax.fori_loop(0, self.candidates, better, start)[0], None

    def codes(self, w: Array, scale: Array, zero: Array | None = None) -> Array:
        """uint8 codes: the exponent j, plus 2**(bits-1) for a negative weight."""
        half = 2 ** (self.bits - 1)
        scale = scale.astype(jnp.float32)
        ratio = jnp.abs(w.astype(jnp.float32)) / jnp.where(scale > 0, scale, 1)
        # Below the smallest level there is nothing to distinguish, and no exponent of 0 to take.
        # round(-log2(m * 2**e)) from the parts: a logarithm's last digit depends on the compiler.
        mantissa, exponent = jnp.frexp(jnp.maximum(ratio, 2.0**-half))
        exponent = (mantissa < np.float32(0.5**0.5)) - exponent
        codes = jnp.clip(exponent, 0, half - 1) + half * (w < 0)
        return codes.astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Array | None = None) -> Array:
        """float32 weights that the codes stand for."""
        return self.levels()[codes] * scale.astype(jnp.float32)

    def pack(self, codes: Array, scale: Array, zero: Array | None = None) -> Codebook:
        """The format of codes [*lead, K, N] and scale [*lead, K / group, N]."""
        levels = jnp.broadcast_to(self.levels(), (*codes.shape[:-2], 2**self.bits))
        return pack_codebook(codes, scale, levels, self.bits, self.group or codes.shape[-2])

    def __call__(self, w: Array, name: str = "") -> Codebook:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return round_to_nearest(self, w, name)
