"""Weights as values with a format: formats, their algebra, and what makes them from a matrix.

A weight is a plain array [*lead, K, N] or a `Format`. The free functions take either.
"""

# What a weight answers
from moejax.weights.format import (
    Format,
    bits_per_weight,
    code_bits,
    concatenate,
    grouped_matmul,
    logical_axes,
    materialize,
    matmul,
    nbytes,
    register_format,
    relative_error,
    shape,
    take,
)

# How a weight travels: names, metadata, shapes
from moejax.weights.manifest import abstract_from_meta, flatten, format_meta, unflatten

# Formats
from moejax.weights.buckets import Buckets
from moejax.weights.codebook import Codebook, pack_codebook
from moejax.weights.low_rank import LowRank, truncated_svd
from moejax.weights.packed import Packed, pack, pack_codes, unpack_codes
from moejax.weights.row_patch import RowPatch, patch_rows
from moejax.weights.shared_base import SharedBase
from moejax.weights.sums import Sum

# Grids: what quantizes
from moejax.weights.clipping import ClippedGrid
from moejax.weights.grid import Grid
from moejax.weights.hqq import HQQGrid
from moejax.weights.quantize import AsymmetricGrid, Log2Grid, SymmetricGrid
from moejax.weights.sign_grids import BinaryGrid, TernaryGrid

# Hidden units in one order
from moejax.weights.alignment import align, barycentre

# Rounding that minds the inputs
from moejax.weights.gptq_rounding import GPTQResult, gptq

__all__ = [
    "AsymmetricGrid",
    "BinaryGrid",
    "Buckets",
    "ClippedGrid",
    "Codebook",
    "Format",
    "GPTQResult",
    "Grid",
    "HQQGrid",
    "Log2Grid",
    "LowRank",
    "Packed",
    "RowPatch",
    "SharedBase",
    "Sum",
    "SymmetricGrid",
    "TernaryGrid",
    "abstract_from_meta",
    "align",
    "barycentre",
    "bits_per_weight",
    "code_bits",
    "concatenate",
    "flatten",
    "format_meta",
    "gptq",
    "grouped_matmul",
    "logical_axes",
    "materialize",
    "matmul",
    "nbytes",
    "pack",
    "pack_codebook",
    "pack_codes",
    "patch_rows",
    "register_format",
    "relative_error",
    "shape",
    "take",
    "truncated_svd",
    "unflatten",
    "unpack_codes",
]
