"""Safetensors files, read and written as NumPy arrays; bfloat16 and float8 through ml_dtypes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from moejax.core.atomic import atomic_file
from moejax.core.errors import CheckpointError

_DTYPES: dict[str, np.dtype] = {
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


class TensorHeader(NamedTuple):
    """Shape, dtype and place of one tensor; `offset` counts bytes from the start of the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    nbytes: int


def safetensors_header(path: Path | str) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes in a safetensors file, without reading its data.

    Raises CheckpointError if the file is missing, truncated or not safetensors, or holds a dtype
    that NumPy has no type for.
    """
    start, header = _checked_header(Path(path))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}, which moejax does not read.",
                f"Convert it to one of {', '.join(_DTYPES)}.",
            )
        first, last = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        tensors[name] = TensorHeader(shape, dtype, start + first, last - first)
    return tensors


def safetensors_metadata(path: Path | str) -> dict[str, str]:
    """The free text metadata of a safetensors file; CheckpointError as for the header."""
    return _checked_header(Path(path))[1].get("__metadata__", {})


def read_safetensors(
    path: Path | str, names: Iterable[str] | None = None, *, finite: bool = False
) -> dict[str, np.ndarray]:
    """The tensors `names` (all when None) of a safetensors file, in the file's order.

    Raises CheckpointError if the file is damaged, a named tensor is missing (near names are shown)
    or, with `finite`, a value is NaN or infinite.
    """
    path = Path(path)
    header = safetensors_header(path)
    wanted = set(header if names is None else names)
    if missing := sorted(wanted - set(header)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensor(s): {', '.join(missing[:3])}{more}.",
            f"It holds {len(header)}: {', '.join(sorted(header)[:6])}, ...",
        )
    tensors = {}
    for name, entry in header.items():
        if name in wanted:
            raw = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset)
            tensors[name] = raw.view(entry.dtype).reshape(entry.shape)
    if finite:
        check_finite(tensors, str(path))
    return tensors


def write_safetensors(
    path: Path | str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays (NumPy or JAX) to one safetensors file, whole or not at all.

    Raises CheckpointError for a dtype the format cannot hold (objects, complex128, 4-bit).
    """
    arrays = {name: _little_endian(np.asarray(value)) for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in _DTYPES.values():
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold.",
                "Pack it into unsigned integers or cast it to a float type first.",
            )
    specs = {
        name: safetensors.TensorSpec(
            dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for name, a in arrays.items()
    }
    with atomic_file(path) as file:
        file.write(safetensors.serialize(specs, metadata=dict(metadata or {})))


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises CheckpointError naming the first tensor of `where` with a NaN or an infinity."""
    for name, array in tensors.items():
        if array.dtype.kind in "fV" and array.dtype.names is None:
            bad = int(array.size - np.count_nonzero(np.isfinite(array)))
            if bad:
                raise CheckpointError(
                    f"{where}: tensor {name!r} holds {bad} value(s) that are NaN or infinite.",
                    "The run that wrote it diverged, or the file is damaged.",
                )


def _checked_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header that the safetensors library found to fit the file."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return 8 + length, json.loads(file.read(length))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        present = path.is_file()
        what = f"is damaged or truncated ({error})" if present else "does not exist"
        raise CheckpointError(
            f"{path} {what}.",
            "Fetch or write it again." if present else "Check the path.",
        ) from error


def _little_endian(array: np.ndarray) -> np.ndarray:
    """`array` in C order and little-endian, as the format asks; 0-d arrays keep their shape."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.require(array, requirements="C")
