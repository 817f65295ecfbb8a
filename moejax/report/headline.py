"""The sentences a study comes down to: what was gained, what was lost."""

from __future__ import annotations

from moejax.report.change import (
    Change,
    average_change,
    base_of,
    compressed,
    groups_of,
    highlights,
    shrinkage,
)
from moejax.report.numbers import count, fixed, percent, ratio, signed_percent, size, with_error
from moejax.runs import ArmResult, StudyResult


def headline(study: StudyResult) -> list[str]:
    """One sentence per arm worth one, then one on the expectations that were stated before."""
    sentences = [_sentence(study, arm) for arm in highlights(study)]
    if not compressed(study):
        sentences = [_alone(arm) for arm in study.arms]
    if study.verdicts:
        held = sum(verdict.held for verdict in study.verdicts)
        sentences.append(f"{held} of {len(study.verdicts)} stated expectations held.")
    return sentences


def basis(study: StudyResult) -> str:
    """What the averages are taken over."""
    if not study.arms:
        return "The study has no arms."
    average, groups = study.arms[0].average, groups_of(study)
    where = f"{len(groups)} groups ({', '.join(groups)})" if len(groups) > 1 else ", ".join(groups)
    much = f"{count(average.bytes)} bytes ({count(average.tokens)} tokens)"
    return f"Measured on {much} of held-out text: {where}."


def _sentence(study: StudyResult, arm: ArmResult) -> str:
    base, change = base_of(study, arm), average_change(study, arm)
    assert base is not None and change is not None, arm.name
    factor = shrinkage(study, arm)
    bits = f"{fixed(arm.bits_per_weight, 2)} bits per weight"
    if factor is None or factor >= 1:
        gained = (
            f"{arm.name} stores {size(arm.stored_bytes)} instead of {size(base.stored_bytes)} "
            f"({ratio(factor)} smaller, {bits})"
        )
    else:
        gained = (
            f"{arm.name} grows to {size(arm.stored_bytes)} from {size(base.stored_bytes)} ({bits})"
        )
    agreement = arm.average.agreement
    same = (
        ""
        if agreement is None
        else f"; its first choice is {base.name}'s for {percent(agreement)} of tokens"
    )
    return f"{gained} and {_lost(change)}{same}."


def _lost(change: Change) -> str:
    amount = with_error(change.bits_per_byte, change.stderr).lstrip("+−")
    if change.within_error:
        whole = with_error(change.bits_per_byte, change.stderr)
        return f"loses nothing beyond the error of measurement ({whole} bits per byte)"
    verb = "loses" if not change.bits_per_byte < 0 else "gains"
    return f"{verb} {amount} bits per byte (perplexity {signed_percent(change.perplexity)})"


def _alone(arm: ArmResult) -> str:
    return (
        f"{arm.name}: {fixed(arm.average.bits_per_byte)} bits per byte on held-out text, "
        f"{count(arm.parameters)} parameters in {size(arm.stored_bytes)}."
    )
