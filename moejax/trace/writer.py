"""Appends rows to a trace; what was flushed survives the process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from moejax.core.atomic import write_json
from moejax.core.errors import DataError, RunError
from moejax.trace.layout import (
    CHUNK_ROWS,
    COLUMNS,
    VERSION,
    TraceLayout,
    TraceRows,
    store_spec,
)
from moejax.trace.reader import RoutingTrace

TRACE_JSON = "trace.json"


class TraceWriter:
    """Appends to the trace in a folder; a context manager that flushes at its end.

    Whole chunks are written in the background as they fill up; `flush` writes the rest, waits, and
    then makes all rows count. Without a flush of one's own, that happens every `flush_rows` rows.
    """

    def __init__(
        self, folder: Path | str, layout: TraceLayout, *, flush_rows: int = 16 * CHUNK_ROWS
    ):
        """Begins a trace, or goes on behind the rows that count of the one that is there.

        Raises DataError if that one has another layout, RunError if the folder cannot be written.
        """
        layout.check()
        self.folder, self.layout = Path(folder).absolute(), layout
        self._flush_rows = flush_rows
        if (self.folder / TRACE_JSON).exists():
            there = RoutingTrace.open(self.folder)
            _require_same(there.layout, layout, self.folder)
            self._rows = self._counted = len(there)
        else:
            self._rows = self._counted = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stores = {
                column: ts.open(
                    store_spec(str(self.folder), column, layout), create=True, open=True
                ).result()
                for column in COLUMNS
            }
            self._count(self._rows)
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error
        self._waiting: list[TraceRows] = []
        self._writes: list[ts.WriteFutures] = []

    def __len__(self) -> int:
        """Rows appended so far, those not yet flushed included."""
        return self._rows + sum(len(rows.request_T) for rows in self._waiting)

    def append(self, rows: TraceRows) -> None:
        """Adds rows. Raises DataError if they do not fit the layout, RunError as `flush`."""
        self._waiting.append(self._checked(rows))
        if len(self) - self._counted >= self._flush_rows:
            self.flush()
        elif len(self) // CHUNK_ROWS > self._rows // CHUNK_ROWS:
            self._write(len(self) - len(self) % CHUNK_ROWS)

    def flush(self) -> None:
        """Returns when all rows are on disk and count; RunError, naming the folder, if not."""
        self._write(len(self))
        try:
            for write in self._writes:
                write.result()
            self._writes = []
            self._count(self._rows)
        except (OSError, ValueError) as error:
            raise _unwritable(self.folder, error) from error
        self._counted = self._rows

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, RunError):  # after a full disk, no second error
            self.flush()

    def _write(self, end: int) -> None:
        """Begins to write the rows before `end`."""
        if end <= self._rows:
            return
        columns = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
        cut = end - self._rows
        # An earlier write of the same chunk must be over: both would replace the whole chunk.
        for write in self._writes:
            write.result()
        self._writes = [
            self._stores[name][self._rows : end].write(column[:cut])
            for name, column in zip(COLUMNS, columns, strict=True)
        ]
        self._waiting = [TraceRows(*(column[cut:] for column in columns))]
        self._rows = end

    def _count(self, rows: int) -> None:
        value: Mapping[str, Any] = {"version": VERSION, "rows": rows, **self.layout.as_json()}
        write_json(self.folder / TRACE_JSON, value)

    def _checked(self, rows: TraceRows) -> TraceRows:
        count = len(rows.request_T)
        for (name, dtype), array in zip(COLUMNS.items(), rows, strict=True):
            wanted = (count, *self.layout.shape(name))
            if np.shape(array) != wanted:
                raise DataError(
                    f"trace column {name!r} has shape {np.shape(array)}, expected {wanted}.",
                    "Append rows of the layout that the trace was begun with.",
                )
            kind = "f" if dtype.kind == "f" else "iu"
            if np.asarray(array).dtype.kind not in kind:
                raise DataError(
                    f"trace column {name!r} is of {np.asarray(array).dtype}, expected {dtype}.",
                    "Append integers, and gates as floats.",
                )
        experts = np.asarray(self.layout.experts)[:, None]
        if count and (np.max(rows.expert_TxLxK - experts) >= 0 or np.min(rows.expert_TxLxK) < -1):
            raise DataError(
                f"a row names an expert beyond the {self.layout.experts} of its layer.",
                "Append ids of router experts, -1 for none.",
            )
        if not np.isfinite(rows.gate_TxLxK).all():
            raise DataError(
                "a row holds a gate weight that is not finite.", "Check the router's logits."
            )
        made = (np.asarray(a, dtype) for a, dtype in zip(rows, COLUMNS.values(), strict=True))
        return TraceRows(*made)


def _require_same(there: TraceLayout, wanted: TraceLayout, folder: Path) -> None:
    for name, value in there.as_json().items():
        if value != wanted.as_json()[name]:
            raise DataError(
                f"{folder} holds a trace whose {name} is {value}, not {wanted.as_json()[name]}.",
                "Record into another folder, or remove the trace that is there.",
            )


def _unwritable(folder: Path, error: Exception) -> RunError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return RunError(
        f"the trace in {folder} cannot be written: {reason[0]}",
        "Free space or record into another folder; the rows that were flushed can be read.",
    )
