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
from moejax.weights.sums import Sum

# Quantizers
from moejax.weights.quantize import AsymmetricGrid, Log2Grid, SymmetricGrid

__all__ = [
    "AsymmetricGrid",
    "Buckets",
    "Codebook",
    "Format",
    "Log2Grid",
    "LowRank",
    "Packed",
    "Sum",
    "SymmetricGrid",
    "abstract_from_meta",
    "bits_per_weight",
    "code_bits",
    "concatenate",
    "flatten",
    "format_meta",
    "grouped_matmul",
    "logical_axes",
    "materialize",
    "matmul",
    "nbytes",
    "pack",
    "pack_codebook",
    "pack_codes",
    "register_format",
    "relative_error",
    "shape",
    "take",
    "truncated_svd",
    "unflatten",
    "unpack_codes",
]
