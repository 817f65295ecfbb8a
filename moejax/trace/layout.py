"""How a routing trace lies on disk.

    FOLDER/trace.json        layout, and how many rows are whole; replaced atomically
    FOLDER/<column>/         one zarr array per column, a row per token, in chunks of rows

Arrays have room for 2^40 rows and hold the chunks that were written. A row counts once trace.json
says so: a process killed at any moment leaves what it had flushed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Self

import numpy as np
import tensorstore as ts

from moejax.core.errors import DataError

VERSION = 1
MOST_ROWS = 2**40
CHUNK_ROWS = 4096
NOBODY = -1  # in `expert`, where a token chose fewer experts than there are columns
PREFILL, DECODE, TRAIN = 0, 1, 2


class TraceRows(NamedTuple):
    """T tokens. request_T, step_T, position_T, token_T: int32; group_T: int16; phase_T: uint8.

    request: numbered from 0 in the trace. step: 0 for the prompt and for text that is read at once,
    then 1, 2, ... for every token that is generated; of a training run, the step. position: of the
    token in its request. token: its id. group: an index into the layout's groups.
    expert_TxLxK: int16, router experts chosen in each MoE layer, -1 behind the last one;
    gate_TxLxK: float32, their weights.
    """

    request_T: np.ndarray
    step_T: np.ndarray
    position_T: np.ndarray
    token_T: np.ndarray
    group_T: np.ndarray
    phase_T: np.ndarray
    expert_TxLxK: np.ndarray
    gate_TxLxK: np.ndarray


COLUMNS = {
    "request": np.dtype("i4"),
    "step": np.dtype("i4"),
    "position": np.dtype("i4"),
    "token": np.dtype("i4"),
    "group": np.dtype("i2"),
    "phase": np.dtype("u1"),
    "expert": np.dtype("i2"),
    "gate": np.dtype("f4"),
}  # in the order of the fields of TraceRows


@dataclasses.dataclass(frozen=True)
class TraceLayout:
    """What all rows of a trace share.

    model: sha256 of the manifest of the model that routed. layers: index of each MoE layer.
    experts: router experts of each. choices: K, the most experts that a token chooses in a layer.
    groups: names of the texts' groups.
    """

    model: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    choices: int
    groups: tuple[str, ...] = ("",)

    def check(self) -> None:
        """Raises DataError if there is nothing to record, or numbers do not fit the columns."""
        fits = len(self.layers) == len(self.experts) > 0 and self.choices >= 1
        if not fits or not all(1 <= count < 2**15 for count in self.experts):
            raise DataError(
                f"a trace of layers {self.layers} with {self.experts} experts, {self.choices} "
                "chosen, cannot be recorded.",
                "Trace a model with MoE layers of 1 to 32,767 experts.",
            )

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Raises KeyError or TypeError for a value that is no layout."""
        lists = {name: tuple(value[name]) for name in ("layers", "experts", "groups")}
        return cls(model=str(value["model"]), choices=int(value["choices"]), **lists)

    def shape(self, column: str) -> tuple[int, ...]:
        """Of one row."""
        return (len(self.layers), self.choices) if column in ("expert", "gate") else ()


def store_spec(path: str, column: str, layout: TraceLayout) -> ts.Spec:
    """The zarr array of a column."""
    inner = layout.shape(column)
    return ts.Spec(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path}/{column}/"},
            "metadata": {
                "shape": [MOST_ROWS, *inner],
                "data_type": COLUMNS[column].name,
                "fill_value": NOBODY if column == "expert" else 0,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [CHUNK_ROWS, *inner]},
                },
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "zstd", "configuration": {"level": 1}},
                ],
            },
        }
    )
