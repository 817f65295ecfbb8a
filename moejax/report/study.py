"""The sections of a compression study: what it gained and lost, where, and by what protocol."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from moejax.report.arms import arms_table, details_table, groups_table, making_table
from moejax.report.change import (
    average_change,
    base_of,
    compressed,
    domain_change,
    frontier,
    groups_of,
    shrinkage,
)
from moejax.report.experts import (
    DEAD,
    DROPPED,
    UNCALIBRATED,
    ExpertMap,
    draw_expert_map,
    expert_map,
)
from moejax.report.figures import file_name
from moejax.report.frontier import Point, draw_frontier
from moejax.report.headline import basis, headline
from moejax.report.page import Page
from moejax.report.specialisation import (
    chosen_layers,
    draw_specialisation,
    mutual_information,
    shares_by_layer,
)
from moejax.report.tables import facts_table
from moejax.report.totals import ledger_table, ledger_totals
from moejax.runs import Ledger, StudyResult
from moejax.runs.records import to_record

MOST_MAPS = 6


def add_headline(page: Page, study: StudyResult) -> None:
    """The sentences above everything, and the expectations the study stated before it ran."""
    sentences = headline(study)
    page.facts["headline"] = sentences
    page.lead(sentences)
    page.text(basis(study), quiet=True)
    if study.verdicts:
        page.section("Expectations")
        page.verdicts([(v.name, v.held, v.detail) for v in study.verdicts])
    for remark in study.remarks:
        page.text(remark)


def add_study(page: Page, study: StudyResult) -> None:
    """Arms, frontier and groups of text."""
    page.facts["study"] = to_record(study)
    page.facts["changes"] = {arm.name: _changes(study, arm.name) for arm in study.arms}
    page.section("Arms")
    page.table(arms_table(study))
    page.folded("How each arm was made", making_table(study))
    if compressed(study):
        _add_frontier(page, study)
    page.section("By group of text")
    page.table(groups_table(study))
    page.folded("All measures of every arm on every group", details_table(study))


def add_experts(page: Page, study: StudyResult | None, ledger: Ledger) -> None:
    """The ledger: what it adds up to, and maps of the experts of the arms that matter most."""
    page.section("Experts")
    totals = ledger_totals(ledger)
    page.table(ledger_table(totals))
    page.facts["ledger"] = {"rows": len(ledger), "arms": to_record(totals)}
    arms = _arms_to_map(study, ledger)
    maps = [found for found in (expert_map(ledger, arm) for arm in arms) if found is not None]
    if not maps:
        return
    measured = [m.relative_error[np.isfinite(m.relative_error)] for m in maps]
    highest = max((float(errors.max()) for errors in measured if errors.size), default=0.0) or 1.0
    left_out = len(ledger.arms()) - len(maps)
    page.text(
        "Maps of bits, calibration tokens and relative error per expert, means over its matrices. "
        "Experts that saw too few tokens or none are grey and hatched in the error map: "
        "their error says nothing about them."
        + (f" {left_out} further arms are in the ledger only." if left_out else "")
    )
    for number, found in enumerate(maps, 1):
        path = page.plots / file_name("experts", number, found.arm)
        draw_expert_map(path, found, highest)
        page.figures([(path, f"Maps of the experts of {found.arm}", _map_caption(found))])


def add_specialisation(page: Page, study: StudyResult) -> None:
    """Which experts serve which group; nothing where routing was not recorded."""
    shares, groups = shares_by_layer(study), groups_of(study)
    if not shares:
        return
    told = {layer: mutual_information(share) for layer, share in shares.items()}
    page.facts["specialisation"] = {
        "groups": list(groups),
        "mutual_information_bits": {str(layer): bits for layer, bits in told.items()},
    }
    path = page.plots / "specialisation.png"
    draw_specialisation(path, groups, shares)
    page.section("Specialisation of the experts")
    highest, lowest = max(told, key=lambda i: told[i]), min(told, key=lambda i: told[i])
    shown, most = len(chosen_layers(sorted(shares))), np.log2(max(len(groups), 1))
    page.text(
        "Share of each group's assignments that an expert gets, against the even share. "
        f"An assignment's expert tells {told[highest]:.3f} bits about its group in layer "
        f"{highest} and {told[lowest]:.3f} in layer {lowest}, of at most {most:.2f} "
        "(mutual information, groups counted equally)."
    )
    caption = "Orange: the expert gets more than its even share of the group; purple: less."
    if shown < len(shares):
        caption += f" {shown} of {len(shares)} layers are drawn."
    page.figures([(path, "Share of assignments by group and expert for each layer", caption)])


def add_protocol(page: Page, study: StudyResult) -> None:
    """What was measured how."""
    page.section("Protocol")
    page.table(
        facts_table(
            "Numbers of two studies compare only where these agree.",
            [(name.replace("_", " "), value) for name, value in study.protocol.items()],
        )
    )


def _add_frontier(page: Page, study: StudyResult) -> None:
    page.section("Quality against size")
    points = study_points(study)
    path = page.plots / "frontier.png"
    left_out = draw_frontier(path, points)
    caption = (
        f"Change against {study.arms[0].name}; down and to the left is better. "
        "Bars are one standard error of the paired difference."
    )
    if left_out:
        caption += f" Not drawn, because not finite: {', '.join(left_out)}."
    page.figures([(path, "Stored bytes against change of bits per byte for every arm", caption)])
    page.facts["frontier"] = [arm.name for arm in frontier(study)]


def study_points(study: StudyResult, series: str = "") -> list[Point]:
    """The arms in the plane of the frontier, all against the first arm, which lies on zero.

    Bars are drawn where an arm was paired with the first one.
    """
    first, points = study.arms[0], []
    for arm in study.arms:
        paired = average_change(study, arm) if arm.base == first.name else None
        bits = arm.average.bits_per_byte - first.average.bits_per_byte
        stderr = None if paired is None else paired.stderr
        plain = arm.base is None or not arm.passes
        points.append(Point(arm.name, arm.stored_bytes, bits, stderr, plain, series))
    return points


def _changes(study: StudyResult, name: str) -> dict[str, Any] | None:
    arm = study.arm(name)
    change = average_change(study, arm)
    if change is None:
        return None
    domains = {group: domain_change(study, arm, group) for group in groups_of(study)}
    return {
        "base": getattr(base_of(study, arm), "name", None),
        "smaller": shrinkage(study, arm),
        "average": asdict(change),
        "domains": {group: None if d is None else asdict(d) for group, d in domains.items()},
    }


def _arms_to_map(study: StudyResult | None, ledger: Ledger) -> list[str]:
    """All arms where few; else those on the frontier first, then the others in order."""
    arms = list(ledger.arms())
    if len(arms) <= MOST_MAPS or study is None:
        return arms[:MOST_MAPS]
    best = [arm.name for arm in frontier(study) if arm.name in arms]
    if len(best) > MOST_MAPS:
        places = np.unique(np.linspace(0, len(best) - 1, MOST_MAPS).round().astype(int))
        best = [best[place] for place in places]
    chosen = [*best, *(arm for arm in arms if arm not in best)][:MOST_MAPS]
    return [arm for arm in arms if arm in chosen]


def _map_caption(found: ExpertMap) -> str:
    many = {
        "dropped": int((found.state == DROPPED).sum()),
        "dead": int((found.state == DEAD).sum()),
        "uncalibrated": int((found.state == UNCALIBRATED).sum()),
    }
    marked = ", ".join(f"{n} {name}" for name, n in many.items() if n)
    total = int(np.isfinite(found.code_bits).sum())
    return (
        f"{found.arm}: {marked or 'every expert calibrated'}; code bits known for {total} experts."
    )
