"""Experts of mixed precision, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.core.errors import SpecError
from moejax.weights.format import (
    Format,
    Weight,
    code_bits,
    grouped_matmul,
    materialize,
    register_format,
    require,
    require_experts,
    take,
)
from moejax.weights.sums import named_axes


@register_format
@dataclass(frozen=True)
class Buckets(Format):
    """Experts in contiguous buckets, each bucket [*lead, E_i, K, N] in a format of its own.

    Expert e of the whole is expert e - E_0 - ... - E_(i-1) of bucket i: whoever wants another
    order permutes the experts (moe.SlotMap). The expert axis is the third from the right.
    """

    parts: tuple[Weight, ...]

    trainable: ClassVar[tuple[str, ...]] = ("parts",)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Experts per bucket."""
        return tuple(part.shape[-3] for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, _, inputs, columns = self.parts[0].shape
        return (*lead, sum(self.sizes), inputs, columns)

    @property
    def code_bits(self) -> float:
        """Mean over the weights of all buckets."""
        weights = [math.prod(part.shape) for part in self.parts]
        bits = [code_bits(part) for part in self.parts]
        return sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        return jnp.concatenate([materialize(part, dtype) for part in self.parts], axis=-3)

    def grouped_matmul(
        self, x_RxK: Array, group_sizes_G: Array, *, group_offset: int | Array = 0
    ) -> Array:
        require_experts(self)
        # Every row belongs to one bucket and is zero in the others: the sum is exact.
        y_RxN = grouped_matmul(x_RxK, self.parts[0], group_sizes_G, group_offset=group_offset)
        for part, start in zip(self.parts[1:], np.cumsum(self.sizes)[:-1], strict=True):
            offset = group_offset + int(start)
            y_RxN += grouped_matmul(x_RxK, part, group_sizes_G, group_offset=offset)
        return y_RxN

    def take(self, index: int | Array) -> Weight:
        """The part under `index` of the leading axis.

        On the expert axis the index must be known, and select bucket by bucket, in order.
        """
        if self.ndim > 3:
            return Buckets(tuple(take(part, index) for part in self.parts))
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        chosen = np.arange(starts[-1])[np.asarray(index)]
        bucket = np.searchsorted(starts, chosen, side="right") - 1
        if chosen.ndim == 0:
            return take(self.parts[int(bucket)], int(chosen - starts[bucket]))
        if np.any(np.diff(bucket) < 0):
            raise SpecError(
                f"experts {chosen.tolist()} would mix the buckets of sizes {self.sizes}.",
                "Select them bucket by bucket, in ascending order, and permute with a SlotMap.",
            )
        kept = [i for i in range(len(self.parts)) if np.any(bucket == i)]
        return Buckets(tuple(take(self.parts[i], chosen[bucket == i] - starts[i]) for i in kept))

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        if weights[0].ndim > 3:
            return super().concatenate(weights)
        return Buckets(tuple(part for weight in weights for part in weight.parts))

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        return named_axes("parts", self.parts, logical)

    def check(self) -> None:
        require(len(self.parts) > 0, self, "there are no buckets", "Give at least one.")
        shapes = [tuple(part.shape) for part in self.parts]
        same = {(*s[:-3], *s[-2:]) for s in shapes}
        require(
            len(same) == 1 and all(len(s) >= 3 for s in shapes),
            self,
            f"buckets have shapes {shapes}",
            "Make all but the expert axis equal.",
        )
        for part in self.parts:
            if isinstance(part, Format):
                part.check()
