"""Grouped matmul over experts stored as low-rank factors."""

from moejax_kernels.lowrank_grouped_matmul.api import BACKENDS, lowrank_grouped_matmul

__all__ = ["BACKENDS", "lowrank_grouped_matmul"]
