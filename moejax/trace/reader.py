"""Reads a trace, also while it is written: by rows, by layer, by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from moejax.core.errors import DataError
from moejax.trace.layout import CHUNK_ROWS, COLUMNS, VERSION, TraceLayout, TraceRows, store_spec


class RoutingTrace:
    """The rows of a trace that counted when it was opened; `RoutingTrace.open(folder)`."""

    def __init__(self, folder: Path, layout: TraceLayout, rows: int, stores: dict):
        self.folder, self.layout, self._rows, self._stores = folder, layout, rows, stores

    @classmethod
    def open(cls, folder: Path | str, model: str | None = None) -> RoutingTrace:
        """Raises DataError if there is no whole trace, or if it is of another model.

        model: sha256 of the manifest that the trace must have been recorded with; None for any.
        """
        folder = Path(folder).absolute()
        try:
            facts = json.loads((folder / "trace.json").read_text())
            version, rows = int(facts["version"]), int(facts["rows"])
            layout = TraceLayout.from_json(facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} holds no readable routing trace ({type(error).__name__}).",
                "Name the folder that a run recorded, with its trace.json.",
            ) from error
        if version != VERSION:
            raise DataError(
                f"{folder} holds a trace of version {version}, this reads {VERSION}.",
                "Record it again.",
            )
        layout.check()
        if model is not None and model != layout.model:
            raise DataError(
                f"{folder} is a trace of the model {layout.model[:12]}, not of {model[:12]}.",
                "Replay a trace of the same model, or record one.",
            )
        try:
            stores = {
                column: ts.open(store_spec(str(folder), column, layout), open=True).result()
                for column in COLUMNS
            }
        except (OSError, ValueError) as error:
            raise _damaged(folder, error) from error
        return cls(folder, layout, rows, stores)

    def __len__(self) -> int:
        """Rows, each a token."""
        return self._rows

    def rows(self, start: int = 0, end: int | None = None) -> TraceRows:
        """Rows start to end, all columns; DataError, naming the column, if one is damaged."""
        return TraceRows(*(self.column(name, start, end) for name in COLUMNS))

    def column(
        self, name: str, start: int = 0, end: int | None = None, layer: int | None = None
    ) -> np.ndarray:
        """One column of rows start to end; of `expert` and `gate`, one layer's [T, K] if given.

        layer: an index into `layout.layers`.
        """
        end = self._rows if end is None else min(end, self._rows)
        part = self._stores[name][start:end]
        try:
            return np.asarray((part if layer is None else part[:, layer]).read().result())
        except (OSError, ValueError) as error:
            raise _damaged(self.folder / name, error) from error

    def batches(self, size: int = 16 * CHUNK_ROWS) -> Iterator[TraceRows]:
        """All rows in order, `size` at a time: memory stays bounded, whatever the trace."""
        for start in range(0, self._rows, size):
            yield self.rows(start, start + size)

    def steps(self) -> Iterator[TraceRows]:
        """Rows that passed through the model at once: neighbours of equal phase and step, and of
        one request unless they are decoded or trained on together."""
        held: list[TraceRows] = []
        for batch in self.batches():
            together = np.where(batch.phase_T == 0, batch.request_T, -1)
            key = np.stack([batch.phase_T, batch.step_T, together])
            starts = 1 + np.flatnonzero((key[:, 1:] != key[:, :-1]).any(0))
            pieces = [
                TraceRows(*(column[a:b] for column in batch))
                for a, b in zip([0, *starts], [*starts, len(batch.step_T)], strict=True)
            ]
            if held and not _same_step(held[0], pieces[0]):
                yield _joined(held)
                held = []
            for piece in pieces[:-1]:
                yield _joined([*held, piece])
                held = []
            held.append(pieces[-1])
        if held:
            yield _joined(held)


def _same_step(a: TraceRows, b: TraceRows) -> bool:
    return (
        a.phase_T[0] == b.phase_T[0]
        and a.step_T[0] == b.step_T[0]
        and (a.phase_T[0] != 0 or a.request_T[0] == b.request_T[0])
    )


def _joined(parts: list[TraceRows]) -> TraceRows:
    return TraceRows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(f"{path} of a trace cannot be read: {reason[0]}", "Record the trace again.")
