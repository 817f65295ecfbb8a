"""Tensors stored as codes and scales, seen as the float tensors that they stand for.

float8: `x.weight` with `x.weight_scale_inv`, a float32 factor per block of 128 x 128
(DeepSeek-V3, arXiv:2412.19437, section 3.3). MXFP4: `x_blocks` [..., N, K/32, 16] with `x_scales`
[..., N, K/32], two 4-bit floats a byte, the lower half first, and a power of two per 32 of them
(OCP Microscaling Formats 1.0; gpt-oss).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from moejax.core.errors import CheckpointError
from moejax.files.stored import StoredTensor

BLOCK = 128
_FLOAT32 = np.dtype(np.float32)
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALED, _CODES, _EXPONENTS = "_scale_inv", "_blocks", "_scales"
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])


def as_floats(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by name, each pair of codes and scales as one tensor of what it stands for.

    Raises CheckpointError if a pair does not fit together or stands beside what it stands for, or
    a float8 tensor has no scales.
    """
    seen: dict[str, StoredTensor] = dict(tensors)
    for name in tensors:
        if name.endswith(_SCALED):
            stem = name.removesuffix(_SCALED)
            if stem in tensors:
                seen[stem] = _float8(stem, tensors[stem], seen.pop(name))
        elif name.endswith(_CODES) and (stem := name.removesuffix(_CODES)) + _EXPONENTS in tensors:
            if stem in tensors:
                raise CheckpointError(
                    f"the files hold {stem} and, as MXFP4, {name} of the same name.",
                    "Only one of them can be the weight; fetch the folder again.",
                )
            seen[stem] = _mxfp4(stem, seen.pop(name), seen.pop(stem + _EXPONENTS))
    for name, tensor in seen.items():
        if tensor.dtype == _FLOAT8:
            raise CheckpointError(
                f"{name} is float8 and has no {name}{_SCALED}.",
                "Without its scales its values are unknown; fetch the whole model.",
            )
    return seen


@dataclass(frozen=True)
class BlockScaled:
    """codes [N, K] times scales [ceil(N / 128), ceil(K / 128)], each for a block of 128 x 128."""

    codes: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        return _FLOAT32

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.codes.parts, *self.scales.parts)

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        last = self.shape[0] if last is None else last
        values = self.codes.read(first, last).astype(np.float32)
        scales = self.scales.read(first // BLOCK, -(-last // BLOCK)).astype(np.float32)
        rows = np.arange(first, last) // BLOCK - first // BLOCK
        for column in range(scales.shape[1]):
            block = slice(column * BLOCK, (column + 1) * BLOCK)
            values[:, block] *= scales[rows, column, None]
        return values


@dataclass(frozen=True)
class Microscaled:
    """fp4(codes) * 2**(exponents - 127): codes [E, N, K/32, 16], exponents [E, N, K/32], uint8.

    It stands for [E, K, N]: the files keep K last, gpt-oss's own weights keep N last.
    """

    codes: StoredTensor
    exponents: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        E, N, G, _ = self.codes.shape
        return (E, 32 * G, N)

    @property
    def dtype(self) -> np.dtype:
        return _FLOAT32

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.codes.parts, *self.exponents.parts)

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        codes = self.codes.read(first, last)
        exponents = self.exponents.read(first, last).astype(np.int32) - 127
        values = np.empty((*codes.shape[:-1], 32), np.float32)
        values[..., 0::2] = _FP4[codes & 15]
        values[..., 1::2] = _FP4[codes >> 4]
        np.ldexp(values, exponents[..., None], out=values)
        E, N, G, _ = codes.shape
        return values.reshape(E, N, 32 * G).swapaxes(1, 2)


def _float8(name: str, codes: StoredTensor, scales: StoredTensor) -> BlockScaled:
    blocks = tuple(-(-size // BLOCK) for size in codes.shape)
    fits = codes.dtype == _FLOAT8 and scales.dtype == _FLOAT32 and len(codes.shape) == 2
    if not fits or scales.shape != blocks:
        raise CheckpointError(
            f"{name}{_SCALED} is {scales.dtype} {scales.shape}, but {name} is {codes.dtype} "
            f"{codes.shape}.",
            "moejax reads float8_e4m3 matrices with a float32 scale per block of 128 x 128.",
        )
    return BlockScaled(codes, scales)


def _mxfp4(name: str, codes: StoredTensor, exponents: StoredTensor) -> Microscaled:
    bytes_each = codes.dtype == exponents.dtype == np.uint8
    fits = bytes_each and len(codes.shape) == 4 and codes.shape[3] == 16
    if not fits or exponents.shape != codes.shape[:3]:
        raise CheckpointError(
            f"{name}{_CODES} is {codes.dtype} {codes.shape} and {name}{_EXPONENTS} is "
            f"{exponents.dtype} {exponents.shape}.",
            "moejax reads MXFP4 as uint8 [experts, outputs, groups, 16] with a scale per group.",
        )
    return Microscaled(codes, exponents)
