"""Localized filtering: two causal convolutions of width 2 before attention (arXiv:2311.15786)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import compat, spec
from moejax.models.norm import Norm, NormSpec, RMSNorm
from moejax.moe import draw

Before = tuple[Array, Array]
"""Of the last token: its input [B, D], and what the first convolution made of it [B, D / 2]."""


@spec
class LocalFilterSpec:
    """norm(x + conv(conv(x))): each convolution sees a token and the one before it."""

    norm: NormSpec = RMSNorm(epsilon=1e-6)

    def init_state(self, width: int, batch: int, dtype: Any) -> Before:
        """Of a text that begins."""
        return jnp.zeros((batch, width), dtype), jnp.zeros((batch, width // 2), dtype)


class LocalFilter(nnx.Module):
    """first: [2 D, D / 2], second: [2 (D / 2), D]: rows for the token before, then for the token.

    first_bias: [D / 2]; second_bias: [D]. A text begins with zeros, for both convolutions.
    """

    def __init__(self, spec: LocalFilterSpec, width: int, scale: float, *, rngs: nnx.Rngs):
        self.spec = spec
        half = width // 2
        self.first = nnx.Param(draw(rngs, (2 * width, half), scale))
        self.first_bias = nnx.Param(jnp.zeros(half, jnp.float32))
        self.second = nnx.Param(draw(rngs, (2 * half, width), scale))
        self.second_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.norm = Norm(spec.norm, width)

    def __call__(
        self, x_BxSxD: Array, before: Before | None, mask_BxS: Array
    ) -> tuple[Array, Before]:
        """The filtered x, and what the next token needs. Padding counts as zeros."""
        if before is None:
            B, _, D = x_BxSxD.shape
            before = self.spec.init_state(D, B, x_BxSxD.dtype)
        x = jnp.where(mask_BxS[..., None], x_BxSxD, 0)
        inner, last = _convolve(x, before[0], self.first, self.first_bias)
        inner = jnp.where(mask_BxS[..., None], inner, 0)
        outer, last_inner = _convolve(inner, before[1], self.second, self.second_bias)
        return self.norm(outer + x_BxSxD), (last, last_inner)


def _convolve(
    x_BxSxC: Array, before_BxC: Array, matrix: nnx.Param, bias: nnx.Param
) -> tuple[Array, Array]:
    shifted = jnp.concatenate([before_BxC[:, None].astype(x_BxSxC.dtype), x_BxSxC], axis=1)
    pairs = jnp.concatenate([shifted[:, :-1], x_BxSxC], axis=-1)
    y = weights.matmul(pairs, compat.read(matrix))
    return y + compat.read(bias).astype(y.dtype), shifted[:, -1].astype(before_BxC.dtype)
