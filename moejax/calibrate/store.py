"""Finished statistics on disk: one safetensors file each, named by a hash of all that decides it.

A file that is damaged, truncated or of something else reads as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moejax.core import CheckpointError, MoejaxError
from moejax.core.atomic import atomic_file
from moejax.files import safetensors_header, safetensors_metadata

MAPPED_BYTES = 1 << 20  # larger statistics stay on disk and are mapped
_NAME = "statistic"
_TYPES = {
    "bool": "BOOL",
    "int32": "I32",
    "int64": "I64",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
}


def statistic_path(folder: Path, key: str) -> Path:
    """Where the statistic of a key lies."""
    return folder / key[:2] / f"{key}.safetensors"


def read_statistic(folder: Path, key: str) -> np.ndarray | None:
    """The statistic, mapped where it is large; None where there is none that is whole."""
    path = statistic_path(folder, key)
    try:
        if not path.is_file():
            return None
        header, facts = safetensors_header(path), safetensors_metadata(path)
        if _NAME not in header or facts.get("key") != key:
            return None
        entry = header[_NAME]
        with path.open("rb") as file:
            file.seek(entry.offset)
            if _sha256_of_rest(file) != facts.get("sha256"):
                return None
    except (CheckpointError, OSError):
        return None
    return _opened(path, entry.dtype, entry.shape, entry.offset)


def write_statistic(folder: Path, key: str, value: np.ndarray) -> np.ndarray:
    """Writes a statistic, whole or not at all, without a copy of it; returns it from disk.

    RunError where the folder cannot be written or the disk is full.
    """
    if value.dtype.name not in _TYPES:
        raise MoejaxError(
            f"a statistic of dtype {value.dtype} cannot be cached.",
            f"finalize() must give one of {', '.join(_TYPES)}.",
        )
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    entry = {
        "dtype": _TYPES[value.dtype.name],
        "shape": list(value.shape),
        "data_offsets": [0, value.nbytes],
    }
    facts = {"key": key, "sha256": digest.hexdigest()}
    header = json.dumps({"__metadata__": facts, _NAME: entry}).encode()
    header += b" " * (-len(header) % 8)  # as the format asks, so that the data is aligned
    path = statistic_path(folder, key)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in _parts(value):
            file.write(part)
    return _opened(path, value.dtype, value.shape, 8 + len(header))


def _parts(value: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in C order, by its leading axis."""
    for part in value if value.ndim > 1 else [value]:
        yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def _sha256_of_rest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _opened(path: Path, dtype: Any, shape: tuple[int, ...], offset: int) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size < MAPPED_BYTES:
        return np.fromfile(path, dtype, offset=offset).reshape(shape)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
