"""The tables of a study: arms, how they were made, and groups of text."""

from __future__ import annotations

from moejax.report.change import (
    average_change,
    base_of,
    domain_change,
    groups_of,
    score_of,
    shrinkage,
)
from moejax.report.numbers import (
    MISSING,
    count,
    exact_bytes,
    fixed,
    percent,
    ratio,
    signed_percent,
    size,
    with_error,
)
from moejax.report.tables import Cell, Column, Row, Table, row
from moejax.runs import ArmResult, StudyResult, duration

ARM = Column("arm", text=True)


def arms_table(study: StudyResult) -> Table:
    """One row per arm; exact values stand behind the rounded ones."""
    columns = (
        ARM,
        Column("stored", "bytes of the saved model, MB = 10⁶ bytes"),
        Column("smaller", "stored bytes of the base over those of the arm"),
        Column("bits/code", "mean bits per code of the compressed matrices"),
        Column("bits/weight", "mean bits per weight with scales and zeros"),
        Column("bits/byte", "bits per byte of held-out text, lower is better"),
        Column(
            "change ± error", "change of bits per byte against the base, with its standard error"
        ),
        Column("perplexity", "relative change of perplexity against the base"),
        Column("KL", "mean KL(base || arm) in nats per token"),
        Column("agreement", "share of tokens with the base's first choice"),
    )
    return Table(
        "Averages over all held-out text. Errors are standard errors of the paired difference, "
        "with evaluation windows as clusters. Hover over a number for its exact value.",
        columns,
        tuple(_arm_row(study, arm) for arm in study.arms),
    )


def making_table(study: StudyResult) -> Table:
    """How every arm was made, and what that and its evaluation cost."""
    columns = (
        ARM,
        Column("parameters"),
        Column("experts", "bytes of the experts in the saved model"),
        Column("time", "time to make and evaluate the arm"),
        Column("tokens/s", "speed of the evaluation"),
        Column("passes", text=True),
    )
    rows = [
        row(
            [
                arm.name,
                count(arm.parameters),
                Cell(size(arm.expert_bytes), exact_bytes(arm.expert_bytes)),
                Cell(duration(arm.seconds), f"{arm.seconds} s"),
                count(arm.average.tokens_per_second),
                " → ".join(arm.passes) or MISSING,
            ],
            marked=base_of(study, arm) is None,
        )
        for arm in study.arms
    ]
    return Table("In the order in which the passes ran.", columns, tuple(rows))


def groups_table(study: StudyResult) -> Table:
    """Bits per byte, arms by groups, with the general compressors as yardsticks."""
    groups = groups_of(study)
    rows = [
        row([name, *(fixed(values.get(group)) for group in groups), MISSING])
        for name, values in study.baselines.items()
    ]
    for arm in study.arms:
        scores = [score_of(arm, group) for group in groups]
        cells = [
            Cell(MISSING)
            if score is None
            else Cell(fixed(score.bits_per_byte), repr(score.bits_per_byte))
            for score in scores
        ]
        average = Cell(fixed(arm.average.bits_per_byte), repr(arm.average.bits_per_byte))
        rows.append(row([arm.name, *cells, average], marked=arm.base is None))
    columns = (
        Column("bits per byte", text=True),
        *(Column(group) for group in groups),
        Column("all"),
    )
    return Table("Lower is better.", columns, tuple(rows))


def details_table(study: StudyResult) -> Table:
    """Every arm on every group, all measures."""
    columns = (
        ARM,
        Column("group", text=True),
        Column("bytes"),
        Column("tokens"),
        Column("bits/byte"),
        Column("change ± error"),
        Column("perplexity"),
        Column("its change"),
        Column("KL"),
        Column("agreement"),
        Column("tokens/s"),
    )
    rows = []
    for arm in study.arms:
        for score in arm.domains:
            change = domain_change(study, arm, score.group)
            cells = [
                arm.name,
                score.group,
                count(score.bytes),
                count(score.tokens),
                Cell(fixed(score.bits_per_byte), repr(score.bits_per_byte)),
                MISSING if change is None else with_error(change.bits_per_byte, change.stderr),
                Cell(fixed(score.perplexity, 3), repr(score.perplexity)),
                MISSING if change is None else signed_percent(change.perplexity),
                _optional(score.kl, fixed(score.kl)),
                _optional(score.agreement, percent(score.agreement)),
                count(score.tokens_per_second),
            ]
            rows.append(row(cells, marked=arm.base is None))
    return Table("Each arm on each group of held-out text.", columns, tuple(rows))


def _arm_row(study: StudyResult, arm: ArmResult) -> Row:
    change, score = average_change(study, arm), arm.average
    cells = [
        arm.name,
        Cell(size(arm.stored_bytes), exact_bytes(arm.stored_bytes)),
        ratio(shrinkage(study, arm)),
        Cell(fixed(arm.code_bits, 2), repr(arm.code_bits)),
        Cell(fixed(arm.bits_per_weight, 2), repr(arm.bits_per_weight)),
        Cell(fixed(score.bits_per_byte), repr(score.bits_per_byte)),
        Cell(MISSING)
        if change is None
        else Cell(with_error(change.bits_per_byte, change.stderr), repr(change.bits_per_byte)),
        MISSING if change is None else signed_percent(change.perplexity),
        _optional(score.kl, fixed(score.kl)),
        _optional(score.agreement, percent(score.agreement)),
    ]
    return row(cells, marked=base_of(study, arm) is None)


def _optional(value: float | None, text: str) -> Cell:
    return Cell(text, "" if value is None else repr(value))
