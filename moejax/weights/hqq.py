"""Half-quadratic quantization: zero points fitted to outliers, without data (HQQ)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from moejax.core import check_that, spec
from moejax.weights.grid import check_grid_group, round_to_nearest, stored
from moejax.weights.packed import Packed, pack

_LARGEST_ZERO = 1024  # beyond, the steps between float16 numbers reach one code


@spec
class HQQGrid:
    """w = (code - zero) * scale, the float16 zero fitted to min |w - w^|_p^p, p < 1.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023; used by
    MiLo (arXiv:2504.02658) and for offloaded Mixtral experts (arXiv:2312.17238). The scale is that
    of the extremes of the group. With codes q fixed, a step shrinks the errors e = w - w^ to
    sign(e) max(|e| - |e|^(p-1) / beta, 0), which leaves small errors out of account as p -> 0, and
    moves zero to the mean of q - (w - e) / scale; then beta grows by kappa. beta is in units of w,
    as in the published code: where all errors are far below (1 / beta)^(1 / (2 - p)), as those of
    usual weights are, e is zero and zero the mean offset of the codes.
    A group and column stops when its mean |w - w^| no longer falls, and keeps the best zero.

    Unlike the published code, which stops a whole tensor at once, experts do not influence each
    other; and a group narrower than max|w| / 1024 * (2**bits - 1) gets that as its range instead of
    the scale 1, so that float16 can hold its zero.
    group: inputs per scale; None for one scale per output column.
    """

    bits: int
    group: int | None
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    def check(self) -> None:
        """1 to 8 bits."""
        check_that(1 <= self.bits <= 8, self, "bits", "Choose 1 to 8.")
        check_that(0 < self.p <= 1, self, "p", "Choose more than 0 and at most 1.")
        check_that(self.beta > 0, self, "beta", "10 is usual.")
        check_that(self.kappa >= 1, self, "kappa", "1.01 is usual.")
        check_that(self.steps >= 1, self, "steps", "20 is usual.")
        check_grid_group(self)

    def scales(self, w: Array) -> tuple[Array, Array]:
        """float16 scale and zero [..., 1, N] of one group w [..., group, N]."""
        w = w.astype(jnp.float32)
        low, high = w.min(-2, keepdims=True), w.max(-2, keepdims=True)
        top = 2**self.bits - 1
        # Divided before the difference, which may overflow.
        narrowest = jnp.maximum(jnp.abs(low), jnp.abs(high)) / _LARGEST_ZERO
        scale = stored(jnp.maximum(high / top - low / top, narrowest))
        step = scale.astype(jnp.float32)
        zero = (-low / step).astype(jnp.float16)

        def falls(state: tuple) -> Array:
            i, *_, falling = state
            return (i < self.steps) & falling.any()

        def fit(state: tuple) -> tuple:
            i, beta, zero, best, least, falling = state
            codes = self.codes(w, scale, zero)
            error = w - self.values(codes, scale, zero)
            size = jnp.abs(error)
            mean = size.mean(-2, keepdims=True)
            falling &= mean < least
            best, least = jnp.where(falling, zero, best), jnp.where(falling, mean, least)
            # |0|^(p-1) is infinite, and the shrunk error zero.
            shrunk = jnp.sign(error) * jnp.maximum(size - size ** (self.p - 1) / beta, 0)
            offset = codes.astype(jnp.float32) - (w - shrunk) / step
            zero = offset.mean(-2, keepdims=True).astype(jnp.float16)
            return i + 1, beta * self.kappa, zero, best, least, falling

        none = jnp.full(zero.shape, jnp.inf)
        state = (0, jnp.float32(self.beta), zero, zero, none, jnp.full(zero.shape, True))
        return scale, lax.while_loop(falls, fit, state)[3]

    def codes(self, w: Array, scale: Array, zero: Any) -> Array:
        """uint8 codes of w [..., group, N] on the grid of its scale and zero [..., 1, N]."""
        shifted = w.astype(jnp.float32) / scale.astype(jnp.float32) + zero.astype(jnp.float32)
        return jnp.clip(jnp.round(shifted), 0, 2**self.bits - 1).astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Any) -> Array:
        """float32 weights that the codes stand for."""
        steps = codes.astype(jnp.float32) - zero.astype(jnp.float32)
        return steps * scale.astype(jnp.float32)

    def pack(self, codes: Array, scale: Array, zero: Any) -> Packed:
        """The format of codes [*lead, K, N] and scale, zero [*lead, K / group, N]."""
        return pack(codes, scale, zero, self.bits, self.group or codes.shape[-2])

    def __call__(self, w: Array, name: str = "") -> Packed:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return round_to_nearest(self, w, name)
