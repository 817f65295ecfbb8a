"""Which of the GPU kernels a product gets."""

from __future__ import annotations

from types import ModuleType

from jax import Array

from moejax_kernels.compat import compute_capability

HOPPER, AMPERE = 9, 8


def attached_backend() -> str | None:
    """The backend of the attached NVIDIA card; None without one, or for one before Ampere.

    The matrix instruction of the Mosaic kernels exists on compute capability 9 alone; older and
    newer cards get the Triton-lowered ones.
    """
    major, _ = compute_capability() or (0, 0)
    if major == HOPPER:
        return "pallas_gpu"
    return "pallas_triton" if major >= AMPERE else None


def kernels_for(backend: str, x_RxK: Array, w_ExKxN: Array) -> ModuleType | None:
    """The module with `forward` and `weight_gradient`; None where only portable code takes them.

    Operands that the Mosaic kernels do not take go to the Triton-lowered ones.
    """
    from moejax_kernels.grouped_matmul import pallas_gpu, pallas_triton

    dtypes = x_RxK.dtype, w_ExKxN.dtype
    if backend == "pallas_gpu" and pallas_gpu.fits(*w_ExKxN.shape[1:], *dtypes):
        return pallas_gpu
    return pallas_triton if pallas_triton.fits(*dtypes) else None
