"""What moves between JAX releases, in one place."""

from __future__ import annotations

from typing import Any


def triton_params(*, warps: int, stages: int) -> Any:
    """Compiler parameters that lower a `pallas_call` for GPUs through Triton.

    None where this JAX has no Triton lowering (it is deprecated from 0.11 on): callers then take
    the portable way.
    """
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return triton.CompilerParams(num_warps=warps, num_stages=stages)
