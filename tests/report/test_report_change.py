"""The arithmetic of a report: changes, frontier, headline."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.report.change import (
    average_change,
    change,
    domain_change,
    frontier,
    highlights,
    shrinkage,
)
from moejax.report.headline import headline
from moejax.runs import StudyResult
from tests.report.made_up import made_up_arm, made_up_score, made_up_study

DENSE = made_up_arm("dense", 1000, None, 32.0)


def study_of(*arms) -> StudyResult:
    return dataclasses.replace(made_up_study((DENSE, *arms)), verdicts=())


@given(base=st.floats(0.5, 3), loss=st.floats(-0.2, 2))
@settings(max_examples=40, deadline=None)
def test_a_paired_change_is_the_difference_of_bits_per_byte(base, loss):
    """Catches nats taken for bits, and tokens taken for bytes."""
    before = made_up_score("docs", base, None)
    after = made_up_score("docs", base + loss, base)
    found = change(after, before)
    assert found.bits_per_byte == pytest.approx(loss, abs=1e-9)
    assert found.perplexity == pytest.approx(after.perplexity / before.perplexity - 1, rel=1e-6)
    bits_per_nat_of_token = after.tokens / (after.bytes * math.log(2))
    assert found.stderr == pytest.approx(0.0021 * bits_per_nat_of_token)


def test_an_unpaired_change_has_no_error():
    """Catches an error bar of zero where none was measured."""
    before = made_up_score("docs", 1.0, None)
    after = dataclasses.replace(made_up_score("docs", 1.5, 1.0), delta_nll=None, delta_stderr=None)
    found = change(after, before)
    assert found.stderr is None and not found.within_error
    assert found.bits_per_byte == pytest.approx(0.5)
    assert found.perplexity == pytest.approx(after.perplexity / before.perplexity - 1)


def test_a_domain_is_compared_with_the_same_domain():
    """Catches the change of the average under the name of a group."""
    arm = made_up_arm("a", 500, 0.1, 4.0)
    worse = tuple(
        made_up_score(s.group, s.bits_per_byte + 0.3, s.bits_per_byte - 0.1)
        if s.group == "code"
        else s
        for s in arm.domains
    )
    study = study_of(dataclasses.replace(arm, domains=worse))
    found = {g: domain_change(study, study.arm("a"), g) for g in ("docs", "code", "none")}
    assert found["docs"].bits_per_byte == pytest.approx(0.1)
    assert found["code"].bits_per_byte == pytest.approx(0.4)
    assert found["none"] is None


def test_the_ratio_is_against_the_arms_own_base():
    """Catches ratios against the first arm of the table."""
    pruned = made_up_arm("pruned", 600, 0.1, 32.0)
    both = dataclasses.replace(made_up_arm("both", 200, 0.2, 4.0), base="pruned")
    study = study_of(pruned, both)
    assert shrinkage(study, study.arm("both")) == 3.0
    assert shrinkage(study, study.arm("dense")) is None
    assert average_change(study, study.arm("dense")) is None


@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_nothing_on_the_frontier_is_beaten_and_everything_else_is(sizes):
    """Catches a frontier of small arms, or of good arms, or with ties twice."""
    arms = [made_up_arm(f"a{i}", size, loss / 10, 4) for i, (size, loss) in enumerate(sizes)]
    study = study_of(*arms)
    best = frontier(study)
    place = {a.name: (a.stored_bytes, a.average.bits_per_byte) for a in study.arms}
    kept = {place[arm.name] for arm in best}
    for name, (size, bits) in place.items():
        beaten = any(s <= size and b <= bits and (s, b) != (size, bits) for s, b in place.values())
        assert ((size, bits) in kept) == (not beaten), name
    assert len(kept) == len(best)


def test_the_headline_takes_the_smallest_nearly_free_arm_and_the_smallest():
    """Catches a headline that shows the gain of one arm with the loss of another."""
    study = study_of(
        made_up_arm("eight", 700, 0.0004, 8.0),
        made_up_arm("six", 600, 0.0008, 6.0),
        made_up_arm("two", 100, 0.5, 2.0),
    )
    assert [arm.name for arm in highlights(study)] == ["six", "two"]
    first, second = headline(study)
    assert first.startswith("six stores 600 B instead of 1.00 kB (1.67× smaller")
    assert "loses nothing beyond the error of measurement (+0.0008 ± 0.0008" in first
    assert "loses 0.5000 ± 0.0008 bits per byte" in second and second.startswith("two")


def test_a_ruined_arm_is_no_best_arm():
    """Catches nan that wins every comparison."""
    ruined = made_up_arm("ruined", 100, 0.1, 1.0)
    scores = {"delta_nll": math.nan, "bits_per_byte": math.nan, "perplexity": math.nan}
    ruined = dataclasses.replace(ruined, average=dataclasses.replace(ruined.average, **scores))
    good = made_up_arm("good", 300, 0.2, 3.0)
    assert [arm.name for arm in highlights(study_of(ruined, good))] == ["good", "ruined"]
    assert [arm.name for arm in frontier(study_of(ruined, good))] == ["good", "dense"]
    assert "nan" in headline(study_of(ruined, good))[1]


def test_an_arm_that_gains_is_said_to_gain():
    """Catches a loss printed with a minus sign as a loss, and growth printed as shrinkage."""
    (sentence,) = headline(study_of(made_up_arm("better", 2000, -0.1, 32.0)))
    assert "gains 0.1000 ± 0.0008 bits per byte" in sentence
    assert "better grows to 2.00 kB from 1.00 kB" in sentence


def test_a_study_without_comparison_says_what_it_found():
    """Catches a headline that needs a compressed arm."""
    (sentence,) = headline(study_of())
    assert sentence.startswith("dense: 1.4250 bits per byte")
