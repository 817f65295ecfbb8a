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
from moejax.weights.dictionary import DictionaryCoded, encode
from moejax.weights.low_rank import LowRank, check_rank, truncated_svd
from moejax.weights.packed import Packed, pack, pack_codes, unpack_codes
from moejax.weights.row_patch import RowPatch, patch_rows
from moejax.weights.sparse import NMSparse, Sparse, pack_nm, pack_sparse
from moejax.weights.shared_base import SharedBase
from moejax.weights.sums import Sum
from moejax.weights.ternary import Ternary, TernaryRows
from moejax.weights.transposed import Transposed

# Grids: what quantizes
from moejax.weights.clipping import ClippedGrid
from moejax.weights.grid import Grid
from moejax.weights.hqq import HQQGrid
from moejax.weights.quantize import AsymmetricGrid, Log2Grid, SymmetricGrid
from moejax.weights.sign_grids import BinaryGrid, TernaryGrid

# Patterns of sparsity: which weights stay
from moejax.weights.sparsity import NOfM, Pattern, PerMatrix, PerOutput, check_pattern

# Hidden units in one order
from moejax.weights.alignment import align, barycentre

# Rounding and pruning that mind the inputs
from moejax.weights.gptq_rounding import GPTQResult, gptq
from moejax.weights.sparse_gpt import SparseGPTResult, sparse_gpt, strip_length

# Factors
from moejax.weights.factors import compensated, compensated_shapes, scaled_svd, whitened_svd

__all__ = [
    "AsymmetricGrid",
    "BinaryGrid",
    "Buckets",
    "ClippedGrid",
    "Codebook",
    "DictionaryCoded",
    "Format",
    "GPTQResult",
    "Grid",
    "HQQGrid",
    "Log2Grid",
    "LowRank",
    "NMSparse",
    "NOfM",
    "Packed",
    "Pattern",
    "PerMatrix",
    "PerOutput",
    "RowPatch",
    "SharedBase",
    "Sparse",
    "SparseGPTResult",
    "Sum",
    "SymmetricGrid",
    "Ternary",
    "TernaryGrid",
    "TernaryRows",
    "Transposed",
    "abstract_from_meta",
    "align",
    "barycentre",
    "bits_per_weight",
    "check_pattern",
    "check_rank",
    "code_bits",
    "compensated",
    "compensated_shapes",
    "concatenate",
    "encode",
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
    "pack_nm",
    "pack_sparse",
    "patch_rows",
    "register_format",
    "relative_error",
    "scaled_svd",
    "shape",
    "sparse_gpt",
    "strip_length",
    "take",
    "truncated_svd",
    "unflatten",
    "unpack_codes",
    "whitened_svd",
]
