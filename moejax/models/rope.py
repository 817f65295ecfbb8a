"""Rotary positions (arXiv:2104.09864) and what stretches them to longer texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from moejax.core import check_that, spec


@runtime_checkable
class RopeScaling(Protocol):
    """Frequencies for texts longer than those of the first training; a spec."""

    def frequencies(self, plain_F: Array, base: float, length_B: Array) -> Array:
        """Angles per position: [F], or [B, 1, 1, F] where they depend on the texts' lengths.

        plain_F: without scaling, base^(-i / F).
        """
        ...

    def attention_factor(self, length_B: Array) -> Array | float:
        """What sine and cosine are multiplied with: a number, or [B, 1, 1, 1]."""
        ...


@spec
class Rope:
    """Rotates pairs of a head's first `width` dimensions by position * base^(-2 i / width).

    width: None for the whole head. interleaved: pairs are (2 i, 2 i + 1); else (i, i + width / 2).
    """

    base: float = 10_000.0
    width: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def check(self) -> None:
        check_that(self.base > 1, self, "base", "10000 is usual.")
        even = self.width is None or (self.width >= 2 and self.width % 2 == 0)
        check_that(even, self, "width", "Pairs are rotated: give an even width, or None.")

    def check_head(self, head_width: int, owner: object, field: str) -> None:
        """SpecError, naming `owner.field`, where heads of this width cannot be rotated."""
        check_that(head_width % 2 == 0, owner, field, "Rotary positions need an even width.")
        check_that(
            self.rotated(head_width) <= head_width,
            owner,
            field,
            f"It is less than Rope.width = {self.width}.",
        )
        if isinstance(self.scaling, LongRope):
            half = self.rotated(head_width) // 2
            check_that(len(self.scaling.short) == half, self.scaling, "short", f"Give {half}.")

    def rotated(self, head_width: int) -> int:
        """How many dimensions of a head are rotated."""
        return head_width if self.width is None else self.width

    def rotation(
        self, head_width: int, position_BxS: Array, mask_BxS: Array
    ) -> Callable[[Array], Array]:
        """Turns x_BxSxHxW by its tokens' positions, in float32; dtype as given."""
        half = self.rotated(head_width) // 2
        frequency = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
        factor: Array | float | None = None
        if self.scaling is not None:
            length_B = jnp.max(jnp.where(mask_BxS, position_BxS + 1, 0), axis=1)
            frequency = self.scaling.frequencies(frequency, self.base, length_B)
            factor = self.scaling.attention_factor(length_B)
        angle = position_BxS[..., None, None].astype(jnp.float32) * frequency
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if factor is not None:
            cos, sin = cos * factor, sin * factor

        def turn(x_BxSxHxW: Array) -> Array:
            wide = x_BxSxHxW.astype(jnp.float32)
            rest = wide[..., 2 * half :]
            if self.interleaved:
                first, second = wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2]
            else:
                first, second = wide[..., :half], wide[..., half : 2 * half]
            pair = [first * cos - second * sin, second * cos + first * sin]
            if self.interleaved:
                turned = jnp.stack(pair, axis=-1).reshape(*wide.shape[:-1], 2 * half)
                parts = [turned]
            else:
                parts = pair
            if rest.shape[-1]:
                parts = [*parts, rest]
            return jnp.concatenate(parts, axis=-1).astype(x_BxSxHxW.dtype)

        return turn


@spec
class LinearScaling:
    """Positions divided by `factor` (arXiv:2306.15595)."""

    factor: float

    def check(self) -> None:
        check_that(self.factor > 0, self, "factor", "Give how many times longer texts become.")

    def frequencies(self, plain_F: Array, base: float, length_B: Array) -> Array:
        return plain_F / self.factor

    def attention_factor(self, length_B: Array) -> float:
        return 1.0


@spec
class Llama3Scaling:
    """Llama 3.1: slow pairs are stretched by `factor`, fast ones kept, those between blended.

    A pair is fast that turns `high_factor` times or more within `original_length` tokens, slow that
    turns `low_factor` times or less.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_length: int

    def check(self) -> None:
        check_that(self.factor > 0, self, "factor", "Give how many times longer texts become.")
        check_that(
            self.high_factor > self.low_factor,
            self,
            "high_factor",
            f"It must be above low_factor = {self.low_factor}.",
        )

    def frequencies(self, plain_F: Array, base: float, length_B: Array) -> Array:
        turns_F = self.original_length * plain_F / (2 * math.pi)
        share_F = (turns_F - self.low_factor) / (self.high_factor - self.low_factor)
        kept_F = jnp.clip(share_F, 0, 1)
        return plain_F * (kept_F + (1 - kept_F) / self.factor)

    def attention_factor(self, length_B: Array) -> float:
        return 1.0


@spec
class YaRN:
    """Fast pairs kept, slow ones stretched, a linear ramp between (arXiv:2309.00071, section 3.2).

    original_length: tokens of a text before the stretch. fast, slow: the ramp's ends in turns per
    original length (beta_fast, beta_slow). scale: of sine and cosine, None for 0.1 ln(factor) + 1;
    DeepSeek's is the quotient of two `yarn_mscale`. whole: the ramp's ends are rounded outwards to
    whole pairs, as most releases do and gpt-oss does not.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    scale: float | None = None
    whole: bool = True

    def check(self) -> None:
        check_that(self.factor >= 1, self, "factor", "Give how many times longer texts become.")
        check_that(self.original_length >= 1, self, "original_length", "Give a number of tokens.")
        check_that(self.fast > self.slow > 0, self, "fast", "It must be above slow, 32 and 1.")

    def frequencies(self, plain_F: Array, base: float, length_B: Array) -> Array:
        half = plain_F.shape[0]
        ends = [
            half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)
            for turns in (self.fast, self.slow)
        ]
        if self.whole:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], 2 * half - 1)
        high = high + 1e-3 if high == low else high
        stretched_F = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / (high - low), 0, 1)
        return plain_F / self.factor * stretched_F + plain_F * (1 - stretched_F)

    def attention_factor(self, length_B: Array) -> float:
        return yarn_mscale(self.factor, 1.0) if self.scale is None else self.scale


def yarn_mscale(factor: float, weight: float) -> float:
    """0.1 weight ln(factor) + 1: what YaRN scales attention by (arXiv:2309.00071, equation 22).

    Where DeepSeek's config has `mscale_all_dim`, the softmax scale takes the square of
    yarn_mscale(factor, mscale_all_dim), and `YaRN.scale` is yarn_mscale(factor, mscale) over it.
    """
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@spec
class LongRope:
    """A divisor per pair, one set for texts up to `original_length`, one beyond (arXiv:2402.13753).

    short, long: a number per pair. short_scale, long_scale: of sine and cosine. Each sequence of a
    batch is judged by its own last valid position; keys cached before a text grew too long keep the
    rotation they had.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    short_scale: float = 1.0
    long_scale: float = 1.0

    def check(self) -> None:
        for field in ("short", "long"):
            values = getattr(self, field)
            check_that(all(v > 0 for v in values), self, field, "Divisors are above 0.")
        check_that(
            len(self.short) == len(self.long), self, "long", f"Give {len(self.short)} numbers."
        )

    def frequencies(self, plain_F: Array, base: float, length_B: Array) -> Array:
        short_F, long_F = (jnp.asarray(v, jnp.float32) for v in (self.short, self.long))
        return plain_F / jnp.where(self._is_long(length_B), long_F, short_F)

    def attention_factor(self, length_B: Array) -> Array:
        return jnp.where(self._is_long(length_B), self.long_scale, self.short_scale)

    def _is_long(self, length_B: Array) -> Array:
        return (length_B > self.original_length)[:, None, None, None]
