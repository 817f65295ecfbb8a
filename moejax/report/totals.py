"""What a ledger adds up to, arm by arm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moejax.report.numbers import MISSING, count, exact_bytes, fixed, size
from moejax.report.tables import Cell, Column, Table, row
from moejax.runs import Ledger, LedgerRow


@dataclass(frozen=True)
class LedgerTotal:
    """An arm's matrices after its last pass.

    matrices: rows that belong to experts or not; experts, dropped, dead, uncalibrated: experts.
    fallbacks: matrices on which a pass could not use its own method. stored_bytes: of what is kept.
    largest_error: of a matrix of a calibrated expert, and where it is; None where not measured.
    output_ratio: mean over calibrated matrices of the output error by that of round-to-nearest.
    """

    matrices: int
    experts: int
    dropped: int
    dead: int
    uncalibrated: int
    fallbacks: int
    stored_bytes: int
    largest_error: float | None
    where: str | None
    output_ratio: float | None


def ledger_totals(ledger: Ledger) -> dict[str, LedgerTotal]:
    """Arm -> its total, in order of appearance."""
    return {arm: _total(list(ledger.last(arm).values())) for arm in ledger.arms()}


def ledger_table(totals: dict[str, LedgerTotal]) -> Table:
    """A row per arm."""
    columns = (
        Column("arm", text=True),
        Column("matrices"),
        Column("experts"),
        Column("dropped"),
        Column("dead", "experts that no calibration token reached"),
        Column("uncalibrated", "experts with too few tokens for their statistics"),
        Column("fallbacks", "matrices on which a pass could not use its own method"),
        Column("stored", "bytes of all matrices in the ledger"),
        Column("largest error", "largest relative error of a matrix of a calibrated expert"),
        Column("where", text=True),
        Column("output error", "on calibration rows, as a share of round-to-nearest's; a mean"),
    )
    rows = [
        row(
            [
                arm,
                count(total.matrices),
                count(total.experts),
                count(total.dropped),
                count(total.dead),
                count(total.uncalibrated),
                count(total.fallbacks),
                Cell(size(total.stored_bytes), exact_bytes(total.stored_bytes)),
                fixed(total.largest_error),
                total.where or MISSING,
                fixed(total.output_ratio),
            ]
        )
        for arm, total in totals.items()
    ]
    return Table("The state of every arm's matrices after its last pass.", columns, tuple(rows))


def _total(rows: list[LedgerRow]) -> LedgerTotal:
    kept = [r for r in rows if not r.dropped]
    measured = [r for r in kept if r.relative_error is not None and r.calibrated and not r.dead]
    worst = max(measured, key=lambda r: r.relative_error or 0.0, default=None)
    return LedgerTotal(
        matrices=len(rows),
        experts=_experts(rows),
        dropped=_experts(r for r in rows if r.dropped),
        dead=_experts(r for r in kept if r.dead),
        uncalibrated=_experts(r for r in kept if not r.calibrated and not r.dead),
        fallbacks=sum(r.fallback is not None for r in rows),
        stored_bytes=sum(r.stored_bytes or 0 for r in kept),
        largest_error=None if worst is None else worst.relative_error,
        where=None if worst is None else _place(worst),
        output_ratio=_mean([r.output_error / r.nearest_error for r in measured if _compared(r)]),  # type: ignore[operator]
    )


def _compared(found: LedgerRow) -> bool:
    return found.output_error is not None and bool(found.nearest_error)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _experts(rows: Iterable[LedgerRow]) -> int:
    return len({(r.layer, r.expert) for r in rows if r.expert is not None})


def _place(found: LedgerRow) -> str:
    expert = "" if found.expert is None else f", expert {found.expert}"
    layer = "" if found.layer < 0 else f"layer {found.layer}"
    return ", ".join(part for part in (layer + expert, found.matrix) if part)
