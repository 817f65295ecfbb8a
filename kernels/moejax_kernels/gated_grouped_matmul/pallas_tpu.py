"""The fused form on TPU: the grouped matmul's kernel with two weights and an epilogue."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from moejax_kernels.grouped_matmul import pallas_tpu
from moejax_kernels.grouped_matmul.tiles import Tiles


def forward(
    x_RxK: Array,
    gate_ExKxN: Array,
    up_ExKxN: Array,
    group_sizes_G: Array,
    group_offset: int | Array,
    activation: Callable[[Array], Array],
    *,
    tiles: Tiles | None = None,
) -> Array:
    """h[r] = activation(x[r] @ gate[e]) * (x[r] @ up[e]), both products and h in float32."""

    def gated(gate_product: Array, up_product: Array) -> Array:
        return activation(gate_product) * up_product

    return pallas_tpu.forward(
        x_RxK, (gate_ExKxN, up_ExKxN), group_sizes_G, group_offset, epilogue=gated, tiles=tiles
    )
