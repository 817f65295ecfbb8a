"""Which of the GPU kernels a product gets."""

from __future__ import annotations

from types import ModuleType

from jax import Array


def kernels_for(backend: str, x_RxK: Array, w_ExKxN: Array) -> ModuleType | None:
    """The module with `forward` and `weight_gradient`; None where only portable code takes them.

    Operands that the Mosaic kernels do not take go to the Triton-lowered ones.
    """
    from moejax_kernels.grouped_matmul import pallas_gpu, pallas_triton

    dtypes = x_RxK.dtype, w_ExKxN.dtype
    if backend == "pallas_gpu" and pallas_gpu.fits(*w_ExKxN.shape[1:], *dtypes):
        return pallas_gpu
    return pallas_triton if pallas_triton.fits(*dtypes) else None
