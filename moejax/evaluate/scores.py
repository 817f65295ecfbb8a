"""From sums per window to scores per group: float64 on the host, in no order that matters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moejax.runs import AVERAGE, DomainScore

PAIRED = ("delta", "kl", "agreed")


@dataclass(frozen=True)
class PairedSums:
    """Sums over the valid tokens of each window against the base's tokens, float64 [windows].

    delta: nll minus the base's, nats. kl: KL(base || arm), nats. agreed: tokens whose most probable
    next token is the base's.
    """

    delta: np.ndarray
    kl: np.ndarray
    agreed: np.ndarray


@dataclass(frozen=True)
class WindowSums:
    """Sums over the valid tokens of each window, float64 [windows].

    tokens: how many there are. nll: -log p(target), nats. paired: None for an arm without a base.
    """

    tokens: np.ndarray
    nll: np.ndarray
    paired: PairedSums | None = None


def window_sums(columns: Mapping[str, np.ndarray]) -> WindowSums:
    """The sums under the names that `token_scores` gives them."""
    paired = PairedSums(*(columns[n] for n in PAIRED)) if PAIRED[0] in columns else None
    return WindowSums(columns["tokens"], columns["nll"], paired)


@dataclass(frozen=True)
class Scores:
    """How one arm does on all text.

    domains: a score per group, in the order in which groups came; average: over all tokens of all
    groups. windows: the sums behind them, per group. assignments: per group, and per layer, valid
    assignments of each router expert, int64 [E]; None for a layer without experts. seconds: time
    spent on this arm, compilation included.
    """

    domains: tuple[DomainScore, ...]
    average: DomainScore
    windows: dict[str, WindowSums]
    assignments: dict[str, tuple[np.ndarray | None, ...]]
    seconds: float


def domain_score(
    group: str, size: int, sums: WindowSums, tokens_per_second: float | None
) -> DomainScore:
    """The score of a group of `size` bytes."""
    tokens, nll, paired = _total(sums.tokens), _total(sums.nll), sums.paired
    return DomainScore(
        group=group,
        tokens=int(tokens),
        bytes=size,
        nll_sum=nll,
        bits_per_byte=nll / (math.log(2) * size),
        perplexity=_exp(nll / tokens),
        kl=_total(paired.kl) / tokens if paired else None,
        agreement=_total(paired.agreed) / tokens if paired else None,
        delta_nll=_total(paired.delta) / tokens if paired else None,
        delta_stderr=clustered_stderr(paired.delta, sums.tokens) if paired else None,
        tokens_per_second=tokens_per_second,
    )


def clustered_stderr(total_W: np.ndarray, tokens_W: np.ndarray) -> float | None:
    """Standard error of sum(total) / sum(tokens) with windows as clusters; None for fewer than two.

    The linearised ratio estimator, W / (W - 1) for the small sample:
    sqrt(W / (W - 1) * sum_w (total_w - mean * tokens_w)^2) / sum_w tokens_w
    (Cochran, Sampling Techniques, chapter 6, without the correction for a finite population).
    """
    W = len(tokens_W)
    if W < 2:
        return None
    tokens = _total(tokens_W)
    residual_W = total_W - _total(total_W) / tokens * tokens_W
    return math.sqrt(W / (W - 1) * _total(np.square(residual_W))) / tokens


def pooled(
    windows: Mapping[str, WindowSums], sizes: Mapping[str, int], tokens_per_second: float | None
) -> DomainScore:
    """The score over the tokens of all groups together.

    The standard error of the paired difference takes the groups as fixed strata: that groups differ
    is no uncertainty of their mean.
    """
    parts = list(windows.values())
    columns = {name: [getattr(part, name) for part in parts] for name in ("tokens", "nll")}
    if parts[0].paired is not None:
        columns |= {name: [getattr(part.paired, name) for part in parts] for name in PAIRED}
    joined = window_sums({name: np.concatenate(column) for name, column in columns.items()})
    score = domain_score(AVERAGE, sum(sizes[g] for g in windows), joined, tokens_per_second)
    if any(part.paired is None for part in parts):
        return score
    errors = [clustered_stderr(part.paired.delta, part.tokens) for part in parts if part.paired]
    if any(error is None for error in errors):
        return dataclasses.replace(score, delta_stderr=None)
    shares = [_total(part.tokens) / score.tokens for part in parts]
    squares = [(share * error) ** 2 for share, error in zip(shares, errors, strict=True) if error]
    return dataclasses.replace(score, delta_stderr=math.sqrt(sum(squares)))


def specialisation(scores: Scores) -> tuple[tuple[tuple[float, ...], ...] | None, ...]:
    """Per layer [groups, experts], the share of a group's assignments that each expert got.

    Rows sum to 1, groups in the order of `scores.domains`; None for a layer without experts.
    """
    by_layer = zip(*(scores.assignments[d.group] for d in scores.domains), strict=True)
    return tuple(_shares(counts) for counts in by_layer)


def _shares(counts: Sequence[np.ndarray | None]) -> tuple[tuple[float, ...], ...] | None:
    rows = [count_E / count_E.sum() for count_E in counts if count_E is not None]
    return tuple(tuple(row.tolist()) for row in rows) or None


def _total(values: np.ndarray) -> float:
    """The exactly rounded sum: the same in whatever order windows came."""
    return math.fsum(values.tolist())


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
