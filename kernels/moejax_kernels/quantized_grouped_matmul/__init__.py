"""Grouped matmul over experts stored as packed integers with group scales."""

from moejax_kernels.quantized_grouped_matmul.api import BACKENDS, quantized_grouped_matmul
from moejax_kernels.quantized_grouped_matmul.layout import layout, pack_codes, unpack_codes

__all__ = ["BACKENDS", "layout", "pack_codes", "quantized_grouped_matmul", "unpack_codes"]
