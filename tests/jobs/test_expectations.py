"""Verdicts on made-up studies, against arithmetic done by hand."""

import dataclasses
import math

import pytest

from moejax.core import ConfigError
from moejax.jobs.comparisons import BeatsControls, DamageRatio, LowersOutputError
from moejax.jobs.expectations import (
    Better,
    BitsPerByteAgainst,
    KnownPerplexity,
    MeanBitsPerByte,
    NoDeadExpert,
    PerplexityChange,
)
from moejax.runs import Ledger, LedgerRow
from tests.report.made_up import made_up_arm, made_up_study

NOTHING = Ledger()


def study(**damages):
    """Arms that lose (nats per token, standard error) against an arm named dense."""
    arms = [made_up_arm("dense", 100, None, 32.0)]
    for name, (delta, error) in damages.items():
        arm = made_up_arm(name, 50, 0.0, 4.0)
        average = dataclasses.replace(arm.average, delta_nll=delta, delta_stderr=error)
        arms.append(dataclasses.replace(arm, average=average))
    return made_up_study(tuple(arms))


def test_the_error_of_a_perplexity_is_that_of_an_exponential():
    """Catches the error of the nats printed as one of per cents, too small where much is lost."""
    found = PerplexityChange(arm="a", at_most=1)(study(a=(math.log(3), 0.01)), NOTHING)
    assert not found.held
    assert found.detail == "+200.000 % (paired standard error 3.000 %)"


@pytest.mark.parametrize("expected", [PerplexityChange(arm="a"), DamageRatio(arm="a", than="b")])
def test_an_unknown_error_is_not_zero(expected):
    """Catches a text of one window whose change is printed as if it were exact."""
    detail = expected(study(a=(0.1, None), b=(0.2, 0.01)), NOTHING).detail
    assert "0.000" not in detail and ("not known" in detail or "nan" in detail)


@pytest.mark.parametrize(
    ("ours", "theirs", "held", "detail"),
    [
        ((0.03, 0.003), (0.06, 0.004), True, "a ratio of 0.500 ± 0.060"),
        ((0.06, 0.004), (0.03, 0.003), False, "a ratio of 2.000 ± 0.240"),
        ((0.01, 0.001), (0.01, 0.001), True, "within two standard errors of the limit"),
        ((0.0, 0.0), (0.06, 0.004), True, "a ratio of 0.000 ± 0.000"),
        ((0.01, 0.001), (0.0, 0.0), False, "0.0100 against 0.0000 nats per token"),
        ((0.0, 0.0), (0.0, 0.0), True, "within two standard errors of the limit"),
        ((-0.02, 0.001), (-0.01, 0.001), True, "-0.0200 against -0.0100 nats per token"),
    ],
)
def test_a_ratio_of_damages_has_its_error_and_its_limits(ours, theirs, held, detail):
    """Catches a division by an arm that loses nothing, and a win inside the noise that is silent
    about it. The error by hand: sqrt(0.003^2 + (0.5 x 0.004)^2) / 0.06 = 0.060."""
    found = DamageRatio(arm="a", than="b")(study(a=ours, b=theirs), NOTHING)
    assert found.held is held
    assert found.detail.endswith(detail)
    clear = "within" not in detail
    assert clear == ("within two standard errors" not in found.detail)


def test_an_arm_beats_controls_only_if_it_beats_the_best_one():
    """Catches a comparison with the controls' mean, and one of unequal bytes."""
    made = study(a=(0.03, 0.01), b=(0.02, 0.01), c=(0.06, 0.01))
    found = BeatsControls(arm="a", controls=("b", "c"))(made, NOTHING)
    assert not found.held and "controls 0.0400, standard deviation 0.0283" in found.detail
    assert BeatsControls(arm="b", controls=("a", "c"))(made, NOTHING).held
    larger = dataclasses.replace(made.arms[2], expert_bytes=made.arms[2].expert_bytes * 2)
    unequal = dataclasses.replace(made, arms=(*made.arms[:2], larger, made.arms[3]))
    with pytest.raises(ConfigError, match="expert bytes"):
        BeatsControls(arm="a", controls=("b", "c"))(unequal, NOTHING)


def test_matrices_without_statistics_do_not_count_as_improved():
    """Catches experts that fell back to rounding, equal errors, and rows of another arm."""

    def row(arm, expert, ours, nearest, **more):
        errors = {"output_error": ours, "nearest_error": nearest}
        return LedgerRow(arm, "p", 0, expert, "up", **errors, **more)

    ledger = Ledger(
        [
            row("a", 0, 0.1, 0.2),
            row("a", 1, 0.2, 0.2),
            row("a", 2, 0.1, 0.2, calibrated=False),
            row("a", 3, None, None),
            row("b", 4, 0.1, 0.2),
        ]
    )
    found = LowersOutputError(arm="a", share=0.5)(study(), ledger)
    assert found.held and found.detail == "1 of 2 calibrated matrices, 50.0 %"
    assert not LowersOutputError(arm="a", share=0.6)(study(), ledger).held
    assert not LowersOutputError(arm="c", share=0.5)(study(), ledger).held


def test_levels_are_compared_with_what_they_are_named_after():
    """Catches means over tokens for means over groups, and a tolerance taken as a factor."""
    made = study(a=(0.1, 0.01))
    groups = [score.bits_per_byte for score in made.arms[0].domains]
    mean = sum(groups) / 4
    assert MeanBitsPerByte(arm="dense", at_most=mean + 1e-9)(made, NOTHING).held
    assert not MeanBitsPerByte(arm="dense", at_most=mean - 1e-9)(made, NOTHING).held
    level = made.arms[0].average.perplexity
    assert KnownPerplexity(arm="dense", value=level / 1.019)(made, NOTHING).held
    assert not KnownPerplexity(arm="dense", value=level / 1.021)(made, NOTHING).held
    ratio = groups[0] / 1.951
    assert BitsPerByteAgainst(arm="dense", group="docs", ratio=ratio + 1e-9)(made, NOTHING).held
    less = BitsPerByteAgainst(arm="dense", group="docs", ratio=ratio - 1e-9)
    assert not less(made, NOTHING).held


@pytest.mark.parametrize(
    ("expected", "problem"),
    [
        (MeanBitsPerByte(arm="nobody", at_most=1), "names the arm 'nobody'"),
        (PerplexityChange(arm="dense"), "has no base"),
        (BitsPerByteAgainst(arm="dense", group="poetry", ratio=1), "names the group 'poetry'"),
        (BitsPerByteAgainst(arm="a", group="docs", ratio=1, compressor="zip"), "no baseline 'zip'"),
        (DamageRatio(arm="a", than="dense"), "the bases of a, dense are dense, None"),
        (Better(arm="a", than="dense"), "is compared with None"),
        (NoDeadExpert(arm="a"), "was not recorded"),
    ],
)
def test_what_a_study_does_not_have_is_an_error(expected, problem):
    """Catches verdicts on numbers that are not there."""
    with pytest.raises(ConfigError, match=problem):
        expected(study(a=(0.1, 0.01)), NOTHING)
