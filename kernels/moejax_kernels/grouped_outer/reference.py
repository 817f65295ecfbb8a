"""The oracle: one row at a time, in float64."""

from __future__ import annotations

import numpy as np


def grouped_outer(
    x_RxK: np.ndarray,
    y_RxN: np.ndarray,
    group_sizes_G: np.ndarray,
    weight_R: np.ndarray | None = None,
) -> np.ndarray:
    """out[g] = sum of weight[r] * x[r] y[r]^T over the rows of group g: float64 [G, K, N]."""
    out = np.zeros((len(group_sizes_G), x_RxK.shape[1], y_RxN.shape[1]))
    ends = np.cumsum(group_sizes_G)
    for r in range(min(len(x_RxK), ends[-1])):
        weight = 1.0 if weight_R is None else float(weight_R[r])
        if weight != 0:
            g = int(np.searchsorted(ends, r, side="right"))
            out[g] += weight * np.outer(x_RxK[r].astype(np.float64), y_RxN[r].astype(np.float64))
    return out
