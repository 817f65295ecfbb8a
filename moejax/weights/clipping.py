"""Clipping: a range narrower than the extremes of a group, chosen by squared error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax.core import check_that, spec
from moejax.weights.format import Format
from moejax.weights.grid import Grid, round_to_nearest, squared_error


@spec
class ClippedGrid:
    """`grid`, with the range of each group and column narrowed to where its squared error is least.

    The search that AWQ (arXiv:2306.00978) does on outputs and OmniQuant (arXiv:2308.13137) by
    gradients, here on the weights themselves, so that no data is needed. The full range is among
    the choices: no group is worse than on `grid`.
    candidates: factors on the smallest and the largest weight of a group, besides 1.
    """

    grid: Grid
    candidates: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)

    def check(self) -> None:
        fitting = bool(self.candidates) and all(0 < factor < 1 for factor in self.candidates)
        check_that(fitting, self, "candidates", "Choose factors between 0 and 1.")

    @property
    def bits(self) -> int:
        """Those of the grid."""
        return self.grid.bits

    @property
    def group(self) -> int | None:
        """That of the grid."""
        return self.grid.group

    def scales(self, w: Array) -> tuple[Array, Array | None]:
        """Scale and zero [..., 1, N] of one group w [..., group, N], as the grid has them."""
        w = w.astype(jnp.float32)
        low = jnp.minimum(w.min(-2, keepdims=True), 0)
        high = jnp.maximum(w.max(-2, keepdims=True), 0)
        factors = jnp.asarray(self.candidates, jnp.float32)

        def narrower(i: Array, best: tuple) -> tuple:
            found = self.grid.scales(jnp.clip(w, factors[i] * low, factors[i] * high))
            error = squared_error(self.grid, w, *found)
            keep = error < best[1]
            return jax.tree.map(lambda new, old: jnp.where(keep, new, old), (found, error), best)

        first = self.grid.scales(w)
        start = (first, squared_error(self.grid, w, *first))
        return lax.fori_loop(0, len(self.candidates), narrower, start)[0]

    def codes(self, w: Array, scale: Array, zero: Any) -> Array:
        """uint8 codes of w [..., group, N] on the grid of its scale and zero [..., 1, N]."""
        return self.grid.codes(w, scale, zero)

    def values(self, codes: Array, scale: Array, zero: Any) -> Array:
        """float32 weights that the codes stand for."""
        return self.grid.values(codes, scale, zero)

    def pack(self, codes: Array, scale: Array, zero: Any) -> Format:
        """The format of codes [*lead, K, N] and scale, zero [*lead, K / group, N]."""
        return self.grid.pack(codes, scale, zero)

    def __call__(self, w: Array, name: str = "") -> Format:
        """Round-to-nearest of w [*lead, K, N]; `name` is the matrix in errors."""
        return round_to_nearest(self, w, name)
