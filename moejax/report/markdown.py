"""The report of a study as Markdown, for docs that live beside the code."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from moejax.report.arms import arms_table, groups_table
from moejax.report.headline import basis, headline
from moejax.report.tables import Table, facts_table
from moejax.runs import StudyResult

HOVER = " Hover over a number for its exact value."  # pages can, Markdown cannot


def study_markdown(
    study: StudyResult, facts: dict[str, Any], figures: Sequence[dict[str, str]] = ()
) -> str:
    """Headline, tables, verdicts, figures and protocol of a study.

    facts: those of its run.json; figures: file, relative to the Markdown, and caption of each.
    """
    git, versions = facts.get("git") or {}, facts.get("versions", {})
    dirty = " with changes" if git.get("dirty") else ""
    commit = git.get("commit", "not from a checkout") + dirty
    parts = [
        f"# {study.protocol.get('study', 'A study')}",
        "\n".join(f"- {sentence}" for sentence in headline(study)),
        basis(study),
        f"Command: `{shlex.join(facts.get('command') or [])}`; commit: {commit}.",
        "## Arms",
        _markdown(arms_table(study)),
        "## By group of text",
        _markdown(groups_table(study)),
    ]
    if study.verdicts:
        lines = [f"- {_held(v.held)}: {v.name}: {v.detail}" for v in study.verdicts]
        parts += ["## Expectations", "\n".join(lines)]
    parts += study.remarks
    if figures:
        parts += ["## Figures", *(f"{f['caption']}\n\n![]({f['file']})" for f in figures)]
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    rows = [(name, value) for name, value in study.protocol.items()] + [("versions", used)]
    parts += ["## Protocol", _markdown(facts_table("", rows))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _held(held: bool) -> str:
    return "held" if held else "**not held**"


def _markdown(table: Table) -> str:
    """A pipe table under its caption."""
    head = [column.name for column in table.columns]
    rule = ["---" if column.text else "---:" for column in table.columns]
    body = [[cell.text for cell in row.cells] for row in table.rows]
    lines = "\n".join(_line(cells) for cells in (head, rule, *body))
    caption = table.caption.removesuffix(HOVER)
    return f"{caption}\n\n{lines}" if caption else lines


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
