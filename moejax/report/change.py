"""What an arm gained and lost against its base: the arithmetic behind every table and figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moejax.runs import ArmResult, DomainScore, StudyResult

# An arm whose perplexity rises by no more than this counts as nearly free in the headline.
NEARLY_FREE = 0.01


@dataclass(frozen=True)
class Change:
    """One arm against its base on one text.

    bits_per_byte: arm - base; stderr: standard error of that difference, None where not measured.
    perplexity: relative change of perplexity, 0.03 for 3 % more.
    """

    bits_per_byte: float
    stderr: float | None
    perplexity: float

    @property
    def within_error(self) -> bool:
        """Whether the change is no larger than two standard errors."""
        return self.stderr is not None and abs(self.bits_per_byte) <= 2 * self.stderr


def change(score: DomainScore, base: DomainScore) -> Change:
    """The change of a score against the base's; the paired difference where there is one."""
    if score.delta_nll is None:
        # Unpaired: two means over the same text.
        per_token = (
            math.log(score.perplexity / base.perplexity) if base.perplexity > 0 else math.nan
        )
        return Change(score.bits_per_byte - base.bits_per_byte, None, _expm1(per_token))
    bits = score.tokens / (score.bytes * math.log(2))
    stderr = None if score.delta_stderr is None else score.delta_stderr * bits
    return Change(score.delta_nll * bits, stderr, _expm1(score.delta_nll))


def base_of(study: StudyResult, arm: ArmResult) -> ArmResult | None:
    """The arm it is compared with; None for a base itself or where the base is not in the study."""
    return next((other for other in study.arms if other.name == arm.base), None)


def average_change(study: StudyResult, arm: ArmResult) -> Change | None:
    """The change over all held-out text; None for an arm without a base."""
    base = base_of(study, arm)
    return None if base is None else change(arm.average, base.average)


def domain_change(study: StudyResult, arm: ArmResult, group: str) -> Change | None:
    """The change on the text of one group; None where either side lacks it."""
    base = base_of(study, arm)
    mine, theirs = score_of(arm, group), None if base is None else score_of(base, group)
    return None if mine is None or theirs is None else change(mine, theirs)


def score_of(arm: ArmResult, group: str) -> DomainScore | None:
    """The arm's score on a group; None where it has none."""
    return next((score for score in arm.domains if score.group == group), None)


def shrinkage(study: StudyResult, arm: ArmResult) -> float | None:
    """Stored bytes of the base over those of the arm; None for an arm without a base."""
    base = base_of(study, arm)
    return None if base is None or not arm.stored_bytes else base.stored_bytes / arm.stored_bytes


def groups_of(study: StudyResult) -> tuple[str, ...]:
    """The groups of held-out text, in order of appearance."""
    return tuple(dict.fromkeys(score.group for arm in study.arms for score in arm.domains))


def compressed(study: StudyResult) -> list[ArmResult]:
    """The arms that are compared with a base of the study."""
    return [arm for arm in study.arms if base_of(study, arm) is not None]


def frontier(study: StudyResult) -> list[ArmResult]:
    """Arms that no other arm beats in both stored bytes and bits per byte, smallest first."""
    kept: list[ArmResult] = []
    finite = [arm for arm in study.arms if math.isfinite(arm.average.bits_per_byte)]
    for arm in sorted(finite, key=lambda a: (a.stored_bytes, a.average.bits_per_byte)):
        if not kept or arm.average.bits_per_byte < kept[-1].average.bits_per_byte:
            kept.append(arm)
    return kept


def highlights(study: StudyResult) -> list[ArmResult]:
    """The arms worth a sentence: the smallest that is nearly free (else the best), the smallest."""
    arms = [arm for arm in compressed(study) if arm.passes and arm.base == study.arms[0].name]
    losses = {arm.name: change(arm.average, _base(study, arm)).perplexity for arm in arms}
    usable = [arm for arm in arms if math.isfinite(losses[arm.name])]
    if not usable:
        return arms[:1]
    free = [arm for arm in usable if losses[arm.name] <= NEARLY_FREE]
    smallest = min(arms, key=lambda arm: arm.stored_bytes)
    best = (
        min(free, key=lambda arm: arm.stored_bytes)
        if free
        else min(usable, key=lambda arm: losses[arm.name])
    )
    return [best] if best is smallest else [best, smallest]


def _base(study: StudyResult, arm: ArmResult) -> DomainScore:
    base = base_of(study, arm)
    assert base is not None, arm.name
    return base.average


def _expm1(value: float) -> float:
    return math.inf if value > 700 else math.expm1(value)
