"""What moves between JAX releases or depends on the attached card, in one place."""

from __future__ import annotations

from typing import Any

import jax


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


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the attached NVIDIA card, None without one.

    A program's lowering knows "cuda" and no more, so a program lowered on a machine without a card
    cannot follow the card that it will run on.
    """
    try:
        device = jax.local_devices(backend="cuda")[0]
        major, minor = str(device.compute_capability).split(".")
    except (RuntimeError, AttributeError, ValueError):
        return None
    return int(major), int(minor)
