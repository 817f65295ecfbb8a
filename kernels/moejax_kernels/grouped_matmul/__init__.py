"""Grouped matmul: rows sorted by group, each group times its own matrix."""

from moejax_kernels.grouped_matmul.api import BACKENDS, grouped_matmul, grouped_matmul_of
from moejax_kernels.grouped_matmul.xla import FAST_COMPILE, FAST_RUN, Loops, block_heights

__all__ = [
    "BACKENDS",
    "FAST_COMPILE",
    "FAST_RUN",
    "Loops",
    "block_heights",
    "grouped_matmul",
    "grouped_matmul_of",
]
