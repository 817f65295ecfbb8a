"""Grids of two and three levels: signs, and signs with zero."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from moejax.core import spec
from moejax.weights.codebook import Codebook, pack_codebook
from moejax.weights.grid import check_grid_group, round_to_nearest, stored
from moejax.weights.packed import Packed, pack


@spec
class BinaryGrid:
    """w = sign(w) * scale, scale = mean|w| of each group; 1 bit.

    The best scale in squared error (XNOR-Net, arXiv:1603.05279, eq. 6); MC-MoE's experts of one bit
    (arXiv:2410.06270). Zero counts as positive; an all-zero group has scale zero.
    group: inputs per scale; None for one scale per output column.
    """

    group: int | None

    def check(self) -> None:
        check_grid_group(self)

    @property
    def bits(self) -> int:
        return 1

    def scales(self, w: Array) -> tuple[Array, None]:
        """float16 scale [..., 1, N] of one group w [..., group, N]; no zero."""
        size = jnp.abs(w.astype(jnp.float32))
        return stored(size.mean(-2, keepdims=True), empty=0.0), None

    def codes(self, w: Array, scale: Array, zero: Any = None) -> Array:
        """uint8 codes: 1 for a weight that is not negative."""
        return (w >= 0).astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Any = None) -> Array:
        """float32 weights that the codes stand for."""
        scale = scale.astype(jnp.float32)
        return jnp.where(codes > 0, scale, -scale)

    def pack(self, codes: Array, scale: Array, zero: Any = None) -> Codebook:
        """The format of codes [*lead, K, N] and scale [*lead, K / group, N]."""
        levels = jnp.broadcast_to(jnp.asarray([-1.0, 1.0]), (*codes.shape[:-2], 2))
        return pack_codebook(codes, scale, levels, 1, self.group or codes.shape[-2])

    def __call__(self, w: Array, name: str = "") -> Codebook:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return round_to_nearest(self, w, name)


@spec
class TernaryGrid:
    """w in {-scale, 0, scale}, the scale of each group best in squared error; 2 bits as stored.

    If the m largest |w|, of sum S_m, keep their sign, S_m / m is the best scale and S_m^2 / m what
    it takes off the error (Ternary Weight Networks, arXiv:1605.04711). All m are tried, after a
    sort; the paper instead takes every |w| above 0.7 mean|w|, which is near the best for weights
    drawn from one normal or uniform distribution.
    group: inputs per scale; None for one scale per output column.
    """

    group: int | None

    def check(self) -> None:
        check_grid_group(self)

    @property
    def bits(self) -> int:
        return 2

    def scales(self, w: Array) -> tuple[Array, None]:
        """float16 scale [..., 1, N] of one group w [..., group, N]; no zero."""
        size = jnp.abs(w.astype(jnp.float32))
        largest = size.max(-2, keepdims=True)
        unit = jnp.where(largest > 0, largest, 1)  # so that sums and squares stay in range
        sums = jnp.cumsum(jnp.sort(size / unit, axis=-2, descending=True), axis=-2)
        counts = jnp.arange(1, w.shape[-2] + 1, dtype=jnp.float32)[:, None]
        best = jnp.argmax(sums * sums / counts, axis=-2, keepdims=True)
        mean = jnp.take_along_axis(sums, best, axis=-2) / (best + 1)
        return stored(mean * largest), None

    def codes(self, w: Array, scale: Array, zero: Any = None) -> Array:
        """uint8 codes 1, 2, 3 of the levels -scale, 0, scale."""
        steps = jnp.round(w.astype(jnp.float32) / scale.astype(jnp.float32))
        return (jnp.clip(steps, -1, 1) + 2).astype(jnp.uint8)

    def values(self, codes: Array, scale: Array, zero: Any = None) -> Array:
        """float32 weights that the codes stand for."""
        return (codes.astype(jnp.float32) - 2) * scale.astype(jnp.float32)

    def pack(self, codes: Array, scale: Array, zero: Any = None) -> Packed:
        """The format of codes [*lead, K, N] and scale [*lead, K / group, N]."""
        return pack(codes, scale, None, 2, self.group or codes.shape[-2])

    def __call__(self, w: Array, name: str = "") -> Packed:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return round_to_nearest(self, w, name)
