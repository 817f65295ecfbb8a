"""Several runs side by side: one table, one frontier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moejax.core.errors import RunError
from moejax.report.change import average_change, compressed, shrinkage
from moejax.report.frontier import draw_frontier
from moejax.report.numbers import (
    MISSING,
    exact_bytes,
    fixed,
    percent,
    ratio,
    signed_percent,
    size,
    with_error,
)
from moejax.report.page import Page
from moejax.report.study import study_points
from moejax.report.tables import Cell, Column, Table, as_text, row
from moejax.runs import RunFolder, StudyResult
from moejax.runs.records import to_record


def compare_reports(folders: Sequence[RunFolder | Path | str], out: Path | str) -> Path:
    """Writes report.html, report.json and plots/ into the folder `out` for the runs in `folders`.

    Changes are against each arm's base in the table, against each run's first arm in the figure.
    Raises RunError when a folder has no results, or `out` is one of the runs.
    """
    out = Path(out)
    runs = [f if isinstance(f, RunFolder) else RunFolder.open(f) for f in folders]
    if (out / "run.json").exists():
        raise RunError(f"{out} is itself a run.", "Choose another folder with --out.")
    if not runs:
        raise RunError("There is no run to compare.", "Name two or more run folders.")
    studies = {name: StudyResult.load(run.results_path) for name, run in _named(runs).items()}
    page = Page(f"{len(studies)} runs side by side", ", ".join(studies), out / "plots")
    differing = protocol_differences(studies)
    page.facts["runs"] = {name: to_record(study) for name, study in studies.items()}
    page.facts["protocol_differences"] = differing
    if differing:
        fields = ", ".join(differing)
        page.lead([f"The protocols of these runs differ in {fields}. Compare with that in mind."])
    page.section("Arms of all runs")
    page.table(_table(studies))
    if any(compressed(study) for study in studies.values()):
        _add_frontier(page, studies)
    if differing:
        page.section("Where the protocols differ")
        page.table(_difference_table(studies, differing))
    return page.save(out)


def _add_frontier(page: Page, studies: dict[str, StudyResult]) -> None:
    page.section("Quality against size")
    points = [point for name, study in studies.items() for point in study_points(study, name)]
    path = page.plots / "frontier.png"
    left_out = draw_frontier(path, points)
    caption = "Change against each run's first arm; bars are one standard error."
    if left_out:
        caption += f" Not drawn, because not finite: {', '.join(left_out)}."
    page.figures([(path, "Stored bytes against change of bits per byte for all runs", caption)])


def protocol_differences(studies: dict[str, StudyResult]) -> list[str]:
    """The protocol fields that do not have one value in all runs."""
    fields = dict.fromkeys(key for study in studies.values() for key in study.protocol)
    return [
        field
        for field in fields
        if len({as_text(study.protocol.get(field)) for study in studies.values()}) > 1
    ]


def _named(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Runs by folder name, with as many parents as keep names apart; a run given twice is one."""
    paths = {run.path.resolve(): run for run in runs}
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path.parts[-depth:]): run for path, run in paths.items()}


def _table(studies: dict[str, StudyResult]) -> Table:
    columns = (
        Column("run", text=True),
        Column("arm", text=True),
        Column("stored"),
        Column("smaller", "stored bytes of the run's base over those of the arm"),
        Column("bits/weight"),
        Column("bits/byte", "of held-out text, lower is better"),
        Column("change ± error", "against the run's base, with its standard error"),
        Column("perplexity", "relative change against the run's base"),
        Column("KL", "nats per token"),
        Column("agreement"),
    )
    rows = []
    for name, study in studies.items():
        for arm in study.arms:
            change, score = average_change(study, arm), arm.average
            cells = [
                name,
                arm.name,
                Cell(size(arm.stored_bytes), exact_bytes(arm.stored_bytes)),
                ratio(shrinkage(study, arm)),
                fixed(arm.bits_per_weight, 2),
                Cell(fixed(score.bits_per_byte), repr(score.bits_per_byte)),
                MISSING if change is None else with_error(change.bits_per_byte, change.stderr),
                MISSING if change is None else signed_percent(change.perplexity),
                fixed(score.kl),
                percent(score.agreement),
            ]
            rows.append(row(cells, marked=change is None))
    return Table("Averages over each run's held-out text.", columns, tuple(rows))


def _difference_table(studies: dict[str, StudyResult], fields: Sequence[str]) -> Table:
    columns = (Column("", text=True), *(Column(name, text=True) for name in studies))
    rows = tuple(
        row([field, *(as_text(study.protocol.get(field)) for study in studies.values())])
        for field in fields
    )
    return Table("Protocol fields with more than one value.", columns, rows)
