"""Tensors that stay on disk until a part of them is asked for, in one file or many shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moejax.core.errors import CheckpointError
from moejax.files.header import read_header, refuse_pickle, unique

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@runtime_checkable
class StoredTensor(Protocol):
    """A tensor on disk. shape, dtype: of what `read` gives. parts: its names in the files."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows first to last of the leading axis, all by default, in an array of their own."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file, read by position: nothing stays mapped."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    nbytes: int

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Raises CheckpointError if the file is gone or has become shorter than its header says."""
        rows = self.shape[0] if self.shape else 1
        last = rows if last is None else last
        stride = self.nbytes // max(rows, 1)
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        try:
            raw = np.fromfile(
                self.path, np.uint8, (last - first) * stride, offset=self.offset + first * stride
            )
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror or error}.", "Fetch it again."
            ) from error
        if raw.size != (last - first) * stride:
            raise CheckpointError(f"{self.path} became shorter while it was read.", "Try again.")
        return raw.view(self.dtype).reshape(shape)


class StoredTensors(Mapping[str, FileTensor]):
    """The tensors of a model folder by name, from one safetensors file or from the shards of an
    index; `files` are the files they lie in."""

    def __init__(self, tensors: Mapping[str, FileTensor]):
        self._tensors = dict(tensors)
        self.files: tuple[Path, ...] = tuple(dict.fromkeys(t.path for t in self._tensors.values()))

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def shard_bytes(self) -> int:
        """Bytes of the largest file."""
        return max((os.path.getsize(path) for path in self.files), default=0)


def open_tensors(folder: Path | str) -> StoredTensors:
    """The tensors below a folder (or in one .safetensors file), headers checked, no data read.

    An index, where there is one, must account for every tensor of its shards, and they for it.
    Raises CheckpointError for a missing shard, an index that names an absent tensor or a file
    outside of the folder, a tensor in no index or in two shards, any damaged file, and a folder
    that holds pickles alone.
    """
    folder = Path(folder)
    refuse_pickle(folder)
    if folder.is_file():
        return StoredTensors(_tensors_of(folder))
    if (folder / INDEX).is_file():
        return StoredTensors(_indexed(folder))
    if (folder / WHOLE).is_file():
        return StoredTensors(_tensors_of(folder / WHOLE))
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return StoredTensors(_tensors_of(found[0]))
    for name in _PICKLES:
        if (folder / name).is_file():
            refuse_pickle(folder / name.removesuffix(".index.json"))
    raise CheckpointError(
        f"{folder} has neither {INDEX} nor {WHOLE}"
        + (f", and {len(found)} other safetensors files." if found else "."),
        "Give the folder of a model; where it is cut into several files, with its index.",
    )


def _indexed(folder: Path) -> dict[str, FileTensor]:
    place = read_index(folder / INDEX)
    tensors: dict[str, FileTensor] = {}
    for file in dict.fromkeys(place.values()):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder} lacks the shard {file} that {INDEX} names.", "Fetch that file too."
            )
        for name, tensor in _tensors_of(folder / file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: {name} is in {tensors[name].path.name} and again in {file}.",
                    "Fetch the folder again; its shards are of two models.",
                )
            if name not in place:
                raise CheckpointError(
                    f"{folder}: {file} holds {name}, which {INDEX} does not name.",
                    "Fetch index and shards of the same revision.",
                )
            if place[name] != file:
                raise CheckpointError(
                    f"{folder}: {INDEX} says that {name} is in {place[name]}, it is in {file}.",
                    "Fetch index and shards of the same revision.",
                )
            tensors[name] = tensor
    if absent := [name for name in place if name not in tensors]:
        raise CheckpointError(
            f"{folder}: {INDEX} names {absent[0]} in {place[absent[0]]}, which lacks it.",
            "Fetch index and shards of the same revision.",
        )
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file of an index; CheckpointError if it is damaged or leads elsewhere."""
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error.problem}.", "Fetch it again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON.", "Fetch it again.") from error
    place = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(place, dict) or not all(isinstance(file, str) for file in place.values()):
        raise CheckpointError(f"{path} has no weight_map of names to files.", "Fetch it again.")
    for name, file in place.items():
        refuse_pickle(Path(file))
        if not file.endswith(".safetensors") or set(file) & set("/\\:\0") or file.startswith("."):
            raise CheckpointError(
                f"{path} places {name} in {file!r}, which is no safetensors file of its folder.",
                "Do not use it: no honest tool wrote that.",
            )
    return place


def _tensors_of(path: Path) -> dict[str, FileTensor]:
    header = read_header(path)
    return {
        name: FileTensor(name, path, entry.shape, entry.dtype, entry.offset, entry.nbytes)
        for name, entry in header.tensors.items()
    }
