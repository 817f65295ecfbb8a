"""Where the inputs of a layer wait for their turn: in host memory, or in one file per layer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moejax.core.atomic import atomic_file

Write = Callable[[int, np.ndarray], None]


class Spool(Protocol):
    """The inputs of one layer, an array per batch; those of the next are written beside them."""

    def read(self, number: int) -> np.ndarray:
        """x_BxSxD of a batch."""
        ...

    def writing(self, layer: int) -> AbstractContextManager[Write]:
        """Takes the inputs of `layer` batch by batch, in order; they are read once it is left."""
        ...


class MemorySpool:
    """In host memory; a batch takes the place of its predecessor."""

    def __init__(self) -> None:
        self._inputs: dict[int, np.ndarray] = {}

    def read(self, number: int) -> np.ndarray:
        return self._inputs[number]

    @contextmanager
    def writing(self, layer: int) -> Iterator[Write]:
        yield self._inputs.__setitem__


class DiskSpool:
    """In `folder`, a file per layer: the bytes of every batch, each with its crc32 behind it.

    A file is whole or absent. Those of a layer and of the one before it are kept, so that a walk
    can go on from the last layer whose statistics are safe.
    """

    def __init__(self, folder: Path, shapes: Sequence[tuple[int, ...]], dtype: Any, layer: int = 0):
        self._folder, self._shapes, self._dtype = folder, shapes, np.dtype(dtype)
        self._layer = layer
        sizes = [math.prod(shape) * self._dtype.itemsize + 4 for shape in shapes]
        self._ends = np.cumsum([0, *sizes])

    def read(self, number: int) -> np.ndarray:
        raw, _ = self._record(self._layer, number)
        return raw.view(self._dtype).reshape(self._shapes[number])

    @contextmanager
    def writing(self, layer: int) -> Iterator[Write]:
        for path in self._files():
            if path.suffix != ".bin" or _layer_of(path) not in (layer - 1, layer):
                path.unlink(missing_ok=True)
        with atomic_file(self._path(layer)) as file:

            def write(number: int, x_BxSxD: np.ndarray) -> None:
                raw = np.ascontiguousarray(x_BxSxD).reshape(-1).view(np.uint8).data
                file.write(raw)
                file.write(zlib.crc32(raw).to_bytes(4, "little"))

            yield write
        self._layer = layer

    def go_to(self, layer: int) -> bool:
        """Reads the inputs of `layer` from now on; False where they are missing or damaged."""
        path = self._path(layer)
        if not path.is_file() or path.stat().st_size != self._ends[-1]:
            return False
        for number in range(len(self._shapes)):
            raw, code = self._record(layer, number)
            if zlib.crc32(raw.data) != code:
                return False
        self._layer = layer
        return True

    def layers(self) -> list[int]:
        """Layers whose inputs lie here, last first."""
        return sorted((_layer_of(p) for p in self._files() if p.suffix == ".bin"), reverse=True)

    def _record(self, layer: int, number: int) -> tuple[np.ndarray, int]:
        start, end = (int(n) for n in self._ends[number : number + 2])
        raw = np.fromfile(self._path(layer), np.uint8, end - start, offset=start)
        return raw[:-4], int.from_bytes(raw[-4:].tobytes(), "little")

    def _files(self) -> list[Path]:
        """All of this spool in the folder, unfinished ones too: `.inputs-3.bin.<random>.part`."""
        return [*self._folder.glob("inputs-*.bin"), *self._folder.glob(".inputs-*.part")]

    def _path(self, layer: int) -> Path:
        return self._folder / f"inputs-{layer}.bin"


def _layer_of(path: Path) -> int:
    return int(path.stem.removeprefix("inputs-"))
