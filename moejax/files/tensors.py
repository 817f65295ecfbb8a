"""Safetensors files, read and written as NumPy arrays; bfloat16 and float8 through ml_dtypes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core.atomic import atomic_file
from moejax.core.errors import CheckpointError
from moejax.files.header import DTYPES, TensorHeader, read_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def safetensors_header(path: Path | str) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes in a safetensors file, without reading its data.

    Raises CheckpointError if the file is missing, truncated or not safetensors, or holds a dtype
    that NumPy has no type for.
    """
    return read_header(path).tensors


def safetensors_metadata(path: Path | str) -> dict[str, str]:
    """The free text metadata of a safetensors file; CheckpointError as for the header."""
    return read_header(path).metadata


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

    One tensor at a time is copied. Raises CheckpointError for a dtype the format cannot hold
    (objects, complex128, 4-bit).
    """
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.newbyteorder("<") not in _NAMES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold.",
                "Pack it into unsigned integers or cast it to a float type first.",
            )
    # Wide dtypes first, as the format's library does: then every tensor is aligned to its own.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _NAMES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [end, end := end + array.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_little_endian(arrays[name]).reshape(-1).view(np.uint8).data)


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


def _little_endian(array: np.ndarray) -> np.ndarray:
    """`array` in C order and little-endian, as the format asks; 0-d arrays keep their shape."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.require(array, requirements="C")
