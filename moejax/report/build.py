"""From a run folder to its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from moejax.core.atomic import write_atomically
from moejax.report.markdown import study_markdown
from moejax.report.page import Page
from moejax.report.study import (
    add_experts,
    add_headline,
    add_protocol,
    add_specialisation,
    add_study,
)
from moejax.report.tables import facts_table
from moejax.report.traces import add_traces
from moejax.report.training import add_training, training_headline
from moejax.runs import RUNNING, Ledger, RunFolder, StudyResult, metrics, read_metrics


def build_report(folder: RunFolder | Path | str) -> Path:
    """Writes report.html, report.json, report.md and plots/ of a run from what lies in its folder.

    Sections follow what the run left: results.json gives the study, metrics.jsonl with a loss the
    training, ledger.jsonl the experts, traces/ the routing.
    Raises RunError when the folder holds no run, or damaged files.
    """
    run = folder if isinstance(folder, RunFolder) else RunFolder.open(folder)
    study = StudyResult.load(run.results_path) if run.results_path.exists() else None
    rows = read_metrics(run.metrics_path)
    ledger = Ledger.load(run.ledger_path) if run.ledger_path.exists() else Ledger()
    page = Page(f"{run.path.resolve().name} · {run.facts['job']}", _subtitle(run.facts), run.plots)
    page.facts["run"] = run.facts
    trained = any(metrics.LOSS in row for row in rows)
    _add_status(page, run.facts)
    if trained:
        page.lead(training_headline(rows))
    if study is not None:
        add_headline(page, study)
    if trained:
        add_training(page, rows, study)
    if study is not None:
        add_study(page, study)
    if len(ledger):
        add_experts(page, study, ledger)
        page.text(
            f"The whole ledger, {len(ledger):,} rows, is ledger.jsonl in the run folder.",
            quiet=True,
        )
    if study is not None:
        add_specialisation(page, study)
    add_traces(page, run)
    if study is not None:
        add_protocol(page, study)
    _add_provenance(page, run)
    if study is not None:
        write_atomically(
            run.path / "report.md", study_markdown(study, run.facts, page.facts.get("figures", ()))
        )
    return page.save(run.path)


def _subtitle(facts: dict[str, Any]) -> str:
    device, git = facts.get("device") or {}, facts.get("git") or {}
    commit = f"commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
    parts = [
        str(facts.get("started", ""))[:10],
        f"moejax {(facts.get('versions') or {}).get('moejax', '')}",
        commit,
        f"{device.get('count', '?')} × {device.get('kind') or device.get('platform', 'device')}",
    ]
    return " · ".join(part for part in parts if part)


def _add_status(page: Page, facts: dict[str, Any]) -> None:
    if facts["status"] in ("failed", "interrupted"):
        reason = f": {facts['error']}" if facts.get("error") else ""
        page.lead([f"This run {facts['status']}{reason}. What follows is what it left."])


def _add_provenance(page: Page, run: RunFolder) -> None:
    facts = run.facts
    page.section("To run it again")
    page.code(shlex.join(facts.get("command") or []))
    running = facts["status"] == RUNNING
    git, device = facts.get("git") or {}, facts.get("device") or {}
    commit = git.get("commit", "not from a checkout") + (
        " with local changes" if git.get("dirty") else ""
    )
    page.table(
        facts_table(
            "config.gin in the run folder is the whole config; run.json has all of this.",
            [
                ("status", "in progress when this was drawn" if running else facts["status"]),
                ("started", facts.get("started")),
                ("ended", facts.get("ended", "not recorded")),
                ("resumed", facts.get("resumed") or "never"),
                ("commit", commit),
                ("config SHA-256", facts["config_sha256"]),
                ("device", device),
                ("versions", facts.get("versions") or {}),
            ],
        )
    )
    if run.config_path.exists():
        page.folded_code("The config", run.config_path.read_text(encoding="utf-8"))
