"""The last lines on the terminal: what was gained, what was lost, where the report lies."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moejax.report.change import average_change, shrinkage
from moejax.report.headline import headline
from moejax.report.numbers import MISSING, fixed, percent, ratio, signed, signed_percent, size
from moejax.runs import StudyResult


def print_summary(
    study: StudyResult, console: Console | None = None, *, report: Path | None = None
) -> None:
    """Prints a table of the arms, the headline, and the path of the report."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("arm", overflow="fold", min_width=12)
    for name in ("stored", "smaller", "bits/byte", "± error", "perplexity", "agreement"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in study.arms:
        change, score = average_change(study, arm), arm.average
        table.add_row(
            Text(arm.name),
            size(arm.stored_bytes),
            ratio(shrinkage(study, arm)),
            fixed(score.bits_per_byte) if change is None else signed(change.bits_per_byte),
            MISSING if change is None else fixed(change.stderr),
            MISSING if change is None else signed_percent(change.perplexity),
            percent(score.agreement),
        )
    console.print(table)
    for sentence in headline(study):
        console.print(Text(sentence))
    if report is not None:
        console.print(Text(f"Report: {report}"), soft_wrap=True)
