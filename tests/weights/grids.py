"""The grids that the contract test runs over, and what tests of grids share."""

from __future__ import annotations

import numpy as np

from moejax.weights import (
    AsymmetricGrid,
    BinaryGrid,
    ClippedGrid,
    Grid,
    HQQGrid,
    Log2Grid,
    SymmetricGrid,
    TernaryGrid,
)

GROUP = 16

GRIDS: dict[str, Grid] = {
    "symmetric": SymmetricGrid(bits=4, group=GROUP),
    "asymmetric": AsymmetricGrid(bits=3, group=GROUP),
    "log2": Log2Grid(bits=3, group=GROUP),
    "hqq": HQQGrid(bits=3, group=GROUP),
    "clipped": ClippedGrid(grid=AsymmetricGrid(bits=2, group=GROUP), candidates=(0.9, 0.7, 0.5)),
    "binary": BinaryGrid(group=GROUP),
    "ternary": TernaryGrid(group=GROUP),
}


def drawn(seed: int, shape: tuple[int, ...], magnitude: float = 1.0) -> np.ndarray:
    """float32 heavy-tailed weights; the first column is of one sign."""
    w = np.random.default_rng(seed).standard_t(4, shape) * magnitude
    w[..., 0] = np.abs(w[..., 0])
    return w.astype(np.float32)


def groups(w: np.ndarray, group: int) -> np.ndarray:
    """[..., K / group, group, N] of [..., K, N]."""
    return w.reshape(*w.shape[:-2], -1, group, w.shape[-1])
