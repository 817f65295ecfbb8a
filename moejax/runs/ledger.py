"""The ledger: what every pass did to every expert matrix, as a table that is saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moejax.core.atomic import atomic_file
from moejax.core.errors import RunError
from moejax.runs.records import from_record, to_record

DROPPED = "dropped"
MERGED = "merged"


@dataclass(frozen=True)
class LedgerRow:
    """One matrix of one expert after one pass.

    layer, expert: indices in the model that the arm started from; layer -1 for a matrix outside the
        layers, expert None where the matrix belongs to no expert.
    tokens, gate_mass: calibration tokens routed to the expert and the sum of their gate weights.
    code_bits: bits per code; stored_bytes: codes, scales and zeros on disk.
    relative_error: |W_new - W|_F / |W|_F; None where not measured.
    output_error: |X (W_new - W)|_F / |X W|_F over the calibration rows X that the matrix saw;
        nearest_error: the same if every weight had gone to the nearest point of its grid.
    fallback: what was done instead of the pass's own method, None where it was followed.
    dead: no token reached the expert. calibrated: enough tokens reached it for its statistics.
    lineage: what became of it in this pass and those before, oldest first ("merged with 5",
        "merged into 3", "dropped"); an expert whose lineage holds an entry that starts with
        "dropped" or "merged into" is no longer in the model.
    """

    arm: str
    pass_name: str
    layer: int
    expert: int | None
    matrix: str
    tokens: int | None = None
    gate_mass: float | None = None
    code_bits: float | None = None
    stored_bytes: int | None = None
    relative_error: float | None = None
    output_error: float | None = None
    nearest_error: float | None = None
    fallback: str | None = None
    dead: bool = False
    calibrated: bool = True
    lineage: tuple[str, ...] = ()

    @property
    def dropped(self) -> bool:
        """Whether the expert is no longer in the model, nor in another one."""
        return any(entry.startswith(DROPPED) for entry in self.lineage)

    @property
    def gone(self) -> bool:
        """Whether the expert is no longer stored on its own: dropped, or merged into another."""
        return self.dropped or any(entry.startswith(f"{MERGED} into") for entry in self.lineage)


class Ledger:
    """Rows in the order in which passes wrote them."""

    def __init__(self, rows: Iterable[LedgerRow] = ()):
        self.rows: list[LedgerRow] = list(rows)

    def add(self, rows: Iterable[LedgerRow]) -> None:
        """Appends rows."""
        self.rows.extend(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self.rows)

    def arms(self) -> tuple[str, ...]:
        """The arms that have rows, in order of appearance."""
        return tuple(dict.fromkeys(row.arm for row in self.rows))

    def last(self, arm: str) -> dict[tuple[int, int | None, str], LedgerRow]:
        """The final state of an arm: (layer, expert, matrix) -> its last row."""
        return {(r.layer, r.expert, r.matrix): r for r in self.rows if r.arm == arm}

    def history(self, arm: str) -> dict[tuple[int, int], tuple[str, ...]]:
        """(layer, expert) -> the passes that treated it, in order, each with what became of it."""
        steps: dict[tuple[int, int], list[str]] = {}
        last: dict[tuple[int, int], LedgerRow] = {}
        for row in self.rows:
            if row.arm != arm or row.expert is None:
                continue
            place = (row.layer, row.expert)
            before = last.get(place)
            new = row.lineage[len(before.lineage) if before else 0 :]
            if new or before is None or before.pass_name != row.pass_name:
                said = f"{row.pass_name}: {', '.join(new)}" if new else row.pass_name
                steps.setdefault(place, []).append(said)
            last[place] = row
        return {place: tuple(said) for place, said in steps.items()}

    def save(self, path: Path | str) -> None:
        """Writes one JSON line per row, whole or not at all."""
        with atomic_file(path) as file:
            for row in self.rows:
                file.write(json.dumps(to_record(row), allow_nan=False).encode() + b"\n")

    @staticmethod
    def load(path: Path | str) -> Ledger:
        """The ledger in `path`; RunError names the line that is damaged."""
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{path} cannot be read: {error}.", "Run the study again.") from error
        rows = []
        for number, line in enumerate(lines, 1):
            where = f"{path.name}, line {number}"
            try:
                data = json.loads(line)
            except ValueError as error:
                raise RunError(f"{where} is damaged: {error}.", "Run the study again.") from error
            rows.append(from_record(LedgerRow, data, where))
        return Ledger(rows)
