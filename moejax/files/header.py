"""The header of a safetensors file, parsed and checked by hand so that every fault has its name.

A file is 8 bytes (little-endian length n), n bytes of JSON, then the data. Nothing larger than the
file itself is ever allocated: the length is held against the file's size before it is believed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from moejax.core.errors import CheckpointError

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MOST_AXES = 32
_METADATA = "__metadata__"
_AGAIN = "Fetch or write it again."
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class TensorHeader(NamedTuple):
    """Shape, dtype and place of one tensor; `offset` counts bytes from the start of the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    nbytes: int


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """The checked header of a safetensors file; none of its data is read.

    Raises CheckpointError if the file is missing, a pickle, truncated, or its header is too long,
    no JSON, names a tensor twice, has a dtype NumPy has no type for, or offsets that leave the
    file, overlap, leave holes or do not fit shape and dtype.
    """
    path = Path(path)
    refuse_pickle(path)
    try:
        with path.open("rb") as file:
            return _parse(path, file, path.stat().st_size)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.", "Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", _AGAIN) from error


def refuse_pickle(path: Path) -> None:
    """CheckpointError for a file whose name says pickle: reading one runs whatever it holds."""
    if path.suffix in _PICKLED:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read; moejax never opens one.",
            "Take the safetensors files of the model, or convert it with its own tools first.",
        )


def _parse(path: Path, file: BinaryIO, size: int) -> Header:
    head = file.read(8)
    if len(head) < 8:
        raise _damaged(path, f"it has {size} bytes, the length of the header alone takes 8")
    length = int.from_bytes(head, "little")
    if length > LONGEST_HEADER:
        raise _damaged(path, f"its header claims {length} bytes, more than any header has")
    if 8 + length > size:
        raise _damaged(path, f"its header claims {length} bytes, {size - 8} are left in the file")
    text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError as error:
        raise _damaged(path, error.problem) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({type(error).__name__})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is no table of tensors")
    metadata = entries.pop(_METADATA, {})
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
        raise _damaged(path, f"{_METADATA} is no table of strings")
    data = size - 8 - length
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_places(path, tensors, 8 + length, data)
    return Header(tensors, metadata)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ; json alone would keep the last of equal ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise CheckpointError(f"it names {_short(twice)} twice")
    return found


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorHeader:
    said = f"tensor {_short(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise _damaged(path, f"{said} lacks dtype, shape or data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(
            f"{path}: {said} has dtype {_short(kind)}, which moejax does not read.",
            f"Convert it to one of {', '.join(DTYPES)}.",
        )
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(map(_is_size, shape)):
        raise _damaged(path, f"{said} has the shape {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _damaged(path, f"{said} has the data_offsets {_short(offsets)}")
    first, last = offsets
    dtype, nbytes = DTYPES[kind], last - first
    if nbytes != math.prod(shape) * dtype.itemsize:
        raise _damaged(
            path, f"{said} has {nbytes} bytes, its shape {_short(shape)} asks for others"
        )
    return TensorHeader(tuple(shape), dtype, start + first, nbytes)


def _check_places(path: Path, tensors: dict[str, TensorHeader], start: int, data: int) -> None:
    """Tensors lie one behind the other, from the first byte of the data to the last."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise _damaged(path, f"tensor {_short(name)} overlaps the one before it")
        if tensor.offset > end:
            raise _damaged(path, f"there is a hole before tensor {_short(name)}")
        end = tensor.offset + tensor.nbytes
        if end > start + data:
            raise _damaged(path, f"tensor {_short(name)} ends behind the end of the file")
    if end != start + data:
        raise _damaged(path, f"{start + data - end} bytes at its end belong to no tensor")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or truncated: {why}.", _AGAIN)
