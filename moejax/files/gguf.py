"""GGUF files, versions 2 and 3: metadata, a table of tensors, and tensors read when asked for.

The layout is ggml's docs/gguf.md: magic, version, counts; key-value pairs; tensor entries; then,
aligned, the data. Every count and size is compared with what is left of the file before anything
is allocated for it, so that a damaged file costs no more memory than its own bytes allow.
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from moejax.core.errors import CheckpointError

_SCALARS = {  # value type -> struct code
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SMALLEST = {kind: struct.calcsize(code) for kind, code in _SCALARS.items()} | {
    _STRING: 8,
    _ARRAY: 12,
}  # bytes that a value of a type takes at least
_DEEPEST = 4  # arrays within arrays
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 65_535

_BLOCKS = {  # tensor type -> (name, weights per block, bytes per block)
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
_OTHER_TYPES = {  # known by name, so that an error can name them
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
_NUMBERS = {name: number for number, (name, _, _) in _BLOCKS.items()}
_READABLE = ", ".join(name for name, _, _ in _BLOCKS.values())
_AGAIN = "Fetch or write the file again."
T = TypeVar("T", int, float, str, bool, list, np.ndarray)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file, read by position and dequantized: nothing stays mapped.

    shape: rows first, as NumPy has it. type: of ggml. nbytes: None for a type that is not read.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int | None

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def dtype(self) -> np.dtype:
        """Of what `read` gives: float16 and bfloat16 as they are, all else float32.

        Raises CheckpointError for a type that moejax does not read.
        """
        if self.nbytes is None:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} has type {self.type}, which moejax does not "
                "read.",
                f"Requantize the model to one of {_READABLE}.",
            )
        plain = {"F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
        return plain.get(self.type, np.dtype("<f4"))

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows first to last of the leading axis, all by default, in an array of their own.

        Raises CheckpointError as `dtype`, and if the file became shorter than its header says.
        """
        dtype, (_, per_block, size) = self.dtype, _BLOCKS[_NUMBERS[self.type]]
        last = self.shape[0] if last is None else last
        row = math.prod(self.shape[1:])
        block, end = first * row // per_block, -(-last * row // per_block)
        try:
            count, start = (end - block) * size, self.offset + block * size
            raw = np.fromfile(self.path, np.uint8, count, offset=start)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}.", _AGAIN) from error
        if raw.size != count:
            raise CheckpointError(f"{self.path} became shorter while it was read.", _AGAIN)
        weights = raw.view(dtype) if per_block == 1 else _dequantized(raw, self.type)
        skipped = first * row - block * per_block
        wanted = weights.reshape(-1)[skipped : skipped + (last - first) * row]
        return wanted.reshape(last - first, *self.shape[1:])


class GGUF:
    """What a GGUF file says of itself; its tensors are read one by one, when they are asked for.

    metadata: key -> int, float, bool, str, NumPy array of numbers, or list of strings or arrays.
    tensors: by name, in the file's order.
    Raises CheckpointError, naming the field, if the file is missing, truncated, or not GGUF 2 or 3.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            mapped = np.memmap(self.path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            there = self.path.is_file()
            raise CheckpointError(
                f"{path} {'is empty' if there else 'cannot be read'} ({error}).",
                _AGAIN if there else "Check the path.",
            ) from error
        cursor = _Cursor(self.path, mapped.data)
        tensor_count, pair_count = _read_counts(cursor)
        self.metadata: dict[str, Any] = _read_metadata(cursor, pair_count)
        self.tensors: dict[str, GGUFTensor] = _read_table(cursor, tensor_count, self._alignment())

    def field(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The metadata value of `key`, or `default` where the file has none.

        Raises CheckpointError if it is of another kind, or missing without a default.
        """
        value = self.metadata.get(key, default)
        widened = kind is float and isinstance(value, int) and not isinstance(value, bool)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not (fits or widened):
            what = "is missing" if value is None else f"is {_short(value)}"
            raise CheckpointError(
                f"{self.path}: {key} {what}, expected a value of type {kind.__name__}.",
                "Convert the model again with a converter that writes it.",
            )
        return kind(value) if widened else value  # type: ignore[return-value]

    def _alignment(self) -> int:
        alignment = self.field("general.alignment", int, 32)
        if alignment < 8 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment = {alignment} is no power of two from 8 on.",
                _AGAIN,
            )
        return alignment


class _Cursor:
    """A place in a file from which values are read, never past its end."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def scalar(self, code: str, what: str) -> Any:
        start = self.advance(struct.calcsize(code), what)
        return struct.unpack_from(code, self.data, start)[0]

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.scalar("<Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise self.damaged(f"{what} has {length} bytes, the format allows {longest}")
        start = self.advance(length, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is no UTF-8 ({error.reason})") from error

    def advance(self, size: int, what: str) -> int:
        """Where `size` bytes begin, which are then behind the cursor."""
        if size > len(self.data) - self.at:
            raise self.damaged(
                f"{what} takes {size} bytes, {len(self.data) - self.at} are left of the file"
            )
        start, self.at = self.at, self.at + size
        return start

    def check_count(self, count: int, smallest: int, what: str) -> None:
        """Raises unless `count` things of at least `smallest` bytes fit into the rest."""
        if count * smallest > len(self.data) - self.at:
            raise self.damaged(
                f"{what} = {count} needs {count * smallest} bytes, "
                f"{len(self.data) - self.at} are left of the file"
            )

    def damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}, byte {self.at}: {problem}.", _AGAIN)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.scalar("<4s", "the magic")
    if magic != b"GGUF":
        raise CheckpointError(
            f"{cursor.path} is no GGUF file: it begins with {magic!r}.", "Check the path."
        )
    version = cursor.scalar("<I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"big-endian, version {swapped}" if swapped in (2, 3) else f"version {version}"
        raise CheckpointError(
            f"{cursor.path} is GGUF of {what}; moejax reads versions 2 and 3, little-endian.",
            "Convert the model again.",
        )
    tensors, pairs = (cursor.scalar("<Q", f"{what} count") for what in ("tensor", "metadata"))
    cursor.check_count(tensors, 8 + 4 + 8 + 4 + 8, "tensor_count")
    cursor.check_count(pairs, 8 + 4 + 1, "metadata_kv_count")
    return tensors, pairs


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.string(f"metadata key {number}", _LONGEST_NAME)
        if key in metadata:
            raise cursor.damaged(f"metadata key {key!r} is there twice")
        metadata[key] = _read_value(cursor, cursor.scalar("<I", f"the type of {key}"), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str, depth: int = 0) -> Any:
    if kind == _STRING:
        return cursor.string(f"the value of {key}")
    if kind == _ARRAY:
        return _read_array(cursor, key, depth + 1)
    if kind not in _SCALARS:
        raise cursor.damaged(f"{key} has value type {kind}, the types are 0 to 12")
    value = cursor.scalar(_SCALARS[kind], f"the value of {key}")
    if kind != _BOOL:
        return value
    if value > 1:
        raise cursor.damaged(f"{key} is a bool of value {value}")
    return bool(value)


def _read_array(cursor: _Cursor, key: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise cursor.damaged(f"{key} nests arrays deeper than {_DEEPEST}")
    kind = cursor.scalar("<I", f"the element type of {key}")
    count = cursor.scalar("<Q", f"the length of {key}")
    if kind not in _SMALLEST:
        raise cursor.damaged(f"{key} has element type {kind}, the types are 0 to 12")
    cursor.check_count(count, _SMALLEST[kind], f"the length of {key}")
    if kind in (_STRING, _ARRAY):
        return [_read_value(cursor, kind, key, depth) for _ in range(count)]
    start = cursor.advance(count * _SMALLEST[kind], key)
    dtype = np.dtype(bool if kind == _BOOL else _SCALARS[kind])
    raw = np.frombuffer(cursor.data, np.uint8, count * _SMALLEST[kind], start)
    if kind == _BOOL and (raw > 1).any():
        raise cursor.damaged(f"{key} holds a bool of value {raw.max()}")
    return raw.view(dtype).copy()


def _read_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for number in range(count):
        name = cursor.string(f"the name of tensor {number}", _LONGEST_NAME)
        if name in entries:
            raise cursor.damaged(f"tensor {name!r} is there twice")
        dimensions = cursor.scalar("<I", f"the number of dimensions of {name!r}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise cursor.damaged(f"tensor {name!r} has {dimensions} dimensions, 1 to 4 are allowed")
        extents = [cursor.scalar("<Q", f"the shape of {name!r}") for _ in range(dimensions)]
        kind = cursor.scalar("<I", f"the type of {name!r}")
        entries[name] = (tuple(extents), kind, cursor.scalar("<Q", f"the offset of {name!r}"))
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _placed(cursor, name, *e, start, alignment) for name, e in entries.items()}
    _check_apart(cursor, tensors)
    return tensors


def _placed(
    cursor: _Cursor,
    name: str,
    extents: tuple[int, ...],
    kind: int,
    offset: int,
    start: int,
    alignment: int,
) -> GGUFTensor:
    """A table entry (extents with the fastest first, offset from `start`), checked."""
    if min(extents) < 1:
        raise cursor.damaged(f"tensor {name!r} has the empty shape {extents}")
    if offset % alignment:
        raise cursor.damaged(f"tensor {name!r} lies at {offset}, no multiple of {alignment}")
    if kind not in _BLOCKS:
        if kind not in _OTHER_TYPES:
            raise cursor.damaged(f"tensor {name!r} has the unknown type {kind}")
        _check_inside(cursor, name, start + offset, 1)
        return GGUFTensor(
            name, cursor.path, extents[::-1], _OTHER_TYPES[kind], start + offset, None
        )
    type_name, weights, size = _BLOCKS[kind]
    if extents[0] % weights:
        raise cursor.damaged(f"tensor {name!r} of {type_name} has rows of {extents[0]} weights")
    nbytes = math.prod(extents) // weights * size
    _check_inside(cursor, name, start + offset, nbytes)
    return GGUFTensor(name, cursor.path, extents[::-1], type_name, start + offset, nbytes)


def _check_inside(cursor: _Cursor, name: str, first: int, nbytes: int) -> None:
    if first + nbytes > len(cursor.data):
        raise cursor.damaged(
            f"tensor {name!r} ends at byte {first + nbytes}, the file at {len(cursor.data)}"
        )


def _check_apart(cursor: _Cursor, tensors: dict[str, GGUFTensor]) -> None:
    """Raises if two tensors share bytes; of a type that is not read, its first byte counts."""
    placed = sorted((t.offset, t.offset + (t.nbytes or 1), name) for name, t in tensors.items())
    for (_, end, name), (start, _, other) in itertools.pairwise(placed):
        if start < end:
            raise cursor.damaged(f"tensors {name!r} and {other!r} overlap")


def _dequantized(raw: np.ndarray, kind: str) -> np.ndarray:
    """float32 [blocks, 32] of the bytes of whole blocks."""
    match kind:
        case "Q8_0":  # scale d, 32 int8: w = d q
            blocks = raw.reshape(-1, 34)
            return _halves(blocks, 0) * blocks[:, 2:].view(np.int8)
        case "Q4_0":  # scale d, 32 nibbles: w = d (q - 8)
            blocks = raw.reshape(-1, 18)
            return _halves(blocks, 0) * (_nibbles(blocks[:, 2:]) - np.float32(8))
        case _:  # Q4_1: scale d, minimum m, 32 nibbles: w = d q + m
            blocks = raw.reshape(-1, 20)
            return _halves(blocks, 0) * _nibbles(blocks[:, 4:]) + _halves(blocks, 2)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as a float32 column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """float32 [blocks, 32]: the low halves of 16 bytes are weights 0 to 15, the high 16 to 31."""
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
