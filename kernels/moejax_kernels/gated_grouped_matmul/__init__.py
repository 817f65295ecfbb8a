"""Gate, up and activation of all experts in one pass over the rows."""

from moejax_kernels.gated_grouped_matmul.api import BACKENDS, gated_grouped_matmul

__all__ = ["BACKENDS", "gated_grouped_matmul"]
