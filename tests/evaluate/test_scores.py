"""Scores from sums per window."""

import math

import numpy as np
import pytest

from moejax.evaluate.scores import (
    PairedSums,
    Scores,
    WindowSums,
    clustered_stderr,
    domain_score,
    pooled,
    specialisation,
)


def _sums(seed, count, paired=True):
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 20, count).astype(np.float64)
    nll, delta, kl = tokens * random.random((3, count))
    agreed = np.floor(tokens * random.random(count))
    return WindowSums(tokens, nll, PairedSums(delta, kl, agreed) if paired else None)


def test_a_score_is_a_mean_over_tokens():
    """Catches means of window means, bits for nats, and bits per token for bits per byte."""
    sums = WindowSums(
        tokens=np.array([1.0, 3.0]),
        nll=np.array([2.0, 3.0]),
        paired=PairedSums(np.array([0.4, 0.0]), np.array([0.1, 0.7]), np.array([1.0, 2.0])),
    )
    found = domain_score("docs", 10, sums, 123.0)
    assert (found.tokens, found.bytes, found.nll_sum) == (4, 10, 5.0)
    assert found.bits_per_byte == pytest.approx(5 / math.log(2) / 10)
    assert found.perplexity == pytest.approx(math.exp(5 / 4))
    assert found.kl == pytest.approx(0.8 / 4)
    assert found.agreement == pytest.approx(3 / 4)
    assert found.delta_nll == pytest.approx(0.1)
    assert found.tokens_per_second == 123.0


def test_the_error_of_equal_windows_is_that_of_their_means():
    """Catches errors over tokens, which are too small, and a division by W for W - 1."""
    tokens, means = np.full(5, 7.0), np.array([0.3, -0.2, 0.5, 0.1, 0.0])
    wanted = means.std(ddof=1) / math.sqrt(5)
    assert clustered_stderr(means * tokens, tokens) == pytest.approx(wanted)


def test_the_error_of_unequal_windows_is_near_the_jackknife():
    """Catches windows weighed equally whatever their length."""
    sums = _sums(0, 400)
    assert sums.paired is not None
    total, tokens, W = sums.paired.delta, sums.tokens, 400
    without = (total.sum() - total) / (tokens.sum() - tokens)
    jackknife = math.sqrt((W - 1) / W * np.square(without - without.mean()).sum())
    assert clustered_stderr(total, tokens) == pytest.approx(jackknife, rel=1e-2)


def test_one_window_has_no_error():
    """Catches an error of zero, or NaN, where nothing is known."""
    found = domain_score("docs", 10, _sums(0, 1), None)
    assert found.delta_nll is not None
    assert found.delta_stderr is None


def test_an_arm_without_a_base_has_no_distance():
    """Catches zeros, which read as a perfect copy."""
    found = domain_score("docs", 10, _sums(0, 3, paired=False), None)
    assert (found.kl, found.agreement, found.delta_nll, found.delta_stderr) == (None,) * 4


def test_a_hopeless_model_has_an_infinite_perplexity():
    """Catches an overflow that ends the run."""
    hopeless = WindowSums(np.array([1.0]), np.array([1e5]))
    assert domain_score("docs", 10, hopeless, None).perplexity == math.inf


def test_the_average_is_over_tokens_of_all_groups():
    """Catches the mean of group means."""
    parts = {"docs": _sums(1, 4), "code": _sums(2, 9)}
    found = pooled(parts, {"docs": 100, "code": 50, "unused": 7}, None)
    tokens = sum(part.tokens.sum() for part in parts.values())
    assert (found.group, found.bytes, found.tokens) == ("average", 150, tokens)
    assert found.nll_sum == pytest.approx(sum(p.nll.sum() for p in parts.values()))
    assert found.kl == pytest.approx(sum(p.paired.kl.sum() for p in parts.values()) / tokens)


def test_the_order_of_windows_does_not_matter():
    """Catches running float sums: these are equal to the last bit."""
    sums, order = _sums(3, 50), np.random.default_rng(0).permutation(50)
    paired = PairedSums(sums.paired.delta[order], sums.paired.kl[order], sums.paired.agreed[order])
    shuffled = WindowSums(sums.tokens[order], sums.nll[order], paired)
    assert domain_score("docs", 9, sums, None) == domain_score("docs", 9, shuffled, None)


def test_specialisation_has_a_row_per_group():
    """Catches shares over all groups, groups out of order, and experts made up for dense layers."""
    parts = {"docs": _sums(1, 2), "code": _sums(2, 2)}
    domains = tuple(domain_score(g, 5, w, None) for g, w in parts.items())
    counts = {"code": (None, np.array([0, 5])), "docs": (None, np.array([3, 1]))}
    scores = Scores(domains, domains[0], parts, counts, 0.0)
    assert specialisation(scores) == (None, ((0.75, 0.25), (0.0, 1.0)))
