"""What a study expects of its numbers; the report prints each with its verdict, held or not."""

from __future__ import annotations

import math
import statistics
from typing import Protocol, runtime_checkable

from moejax.core import ConfigError, check_that, spec
from moejax.runs import ArmResult, Ledger, StudyResult, Verdict


@runtime_checkable
class Expectation(Protocol):
    """A claim on a finished study and the ledger of its passes."""

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict: ...


@spec
class PerplexityChange:
    """The perplexity of `arm` changes against its base by so many per cent."""

    arm: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        average = arm_of(study, self.arm).average
        if average.delta_nll is None:
            raise ConfigError(f"the arm {self.arm!r} has no base.", "Expect changes of other arms.")
        change = 100 * math.expm1(average.delta_nll)
        error = "not known: one window"
        if average.delta_stderr is not None:
            # Of exp(x) it is exp(x) times that of x, to first order.
            error = f"{100 * math.exp(average.delta_nll) * average.delta_stderr:.3f} %"
        wanted = _range(self.at_least, self.at_most, " %")
        return Verdict(
            name=f"perplexity of {self.arm} changes by {wanted}",
            held=self.at_least <= change <= self.at_most,
            detail=f"{change:+.3f} % (paired standard error {error})",
        )


@spec
class KnownPerplexity:
    """The perplexity of `arm` is `value`, known from elsewhere, to `within` per cent."""

    arm: str
    value: float
    within: float = 2.0

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        found = arm_of(study, self.arm).average.perplexity
        away = 100 * (found / self.value - 1)
        return Verdict(
            name=f"perplexity of {self.arm} is {self.value:g} to {self.within:g} %",
            held=abs(away) <= self.within,
            detail=f"{found:.3f} ({away:+.2f} %)",
        )


@spec
class BitsPerByteAgainst:
    """Bits per byte of `arm` on `group` are at most `ratio` of those of a general compressor."""

    arm: str
    group: str
    ratio: float
    compressor: str = "xz -9e"

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        ours = _domain(arm_of(study, self.arm), self.group)
        theirs = study.baselines.get(self.compressor, {}).get(self.group)
        if theirs is None:
            raise ConfigError(
                f"there is no baseline {self.compressor!r} on {self.group}.",
                f"The study has {', '.join(study.baselines)}.",
            )
        return Verdict(
            name=f"{self.arm} on {self.group}: at most {self.ratio:g} of {self.compressor}",
            held=ours <= self.ratio * theirs,
            detail=f"{ours:.3f} bits per byte against {theirs:.3f}, {ours / theirs:.3f}",
        )


@spec
class MeanBitsPerByte:
    """The mean over groups of the bits per byte of `arm` is at most `at_most`."""

    arm: str
    at_most: float

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        domains = arm_of(study, self.arm).domains
        mean = sum(d.bits_per_byte for d in domains) / len(domains)
        return Verdict(
            name=f"{self.arm}: mean bits per byte of the groups at most {self.at_most:g}",
            held=mean <= self.at_most,
            detail=f"{mean:.3f}",
        )


@spec
class Better:
    """`arm`, the base of `than`, predicts better on every group, beyond two standard errors."""

    arm: str
    than: str

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        other = arm_of(study, self.than)
        if other.base != self.arm:
            raise ConfigError(
                f"the arm {self.than!r} is compared with {other.base!r}, not {self.arm!r}.",
                f"Set its base to {self.arm!r}: a verdict needs paired differences.",
            )
        gaps = {d.group: (d.delta_nll or 0.0, d.delta_stderr or math.inf) for d in other.domains}
        return Verdict(
            name=f"{self.arm} is better than {self.than} on every group",
            held=all(gap > 2 * error for gap, error in gaps.values()),
            detail=", ".join(f"{g} {gap:+.4f} ± {e:.4f}" for g, (gap, e) in gaps.items())
            + " nats per token more, one seed of training each",
        )


@spec
class LosesLess:
    """`arm` loses less against its base than the arms `than` do on average, of the same base.

    Beyond twice the spread: the standard deviation over `than`, and the two paired standard errors.
    """

    arm: str
    than: tuple[str, ...]

    def check(self) -> None:
        check_that(len(self.than) > 0, self, "than", "Name the arms to compare with.")

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        arms = [arm_of(study, name) for name in (self.arm, *self.than)]
        found = [(arm.average.delta_nll, arm.average.delta_stderr or 0.0) for arm in arms]
        if len({arm.base for arm in arms}) > 1 or any(delta is None for delta, _ in found):
            raise ConfigError(
                f"{self.arm!r} and {list(self.than)} have no common base.",
                "Compare arms of one base.",
            )
        (mine, error), *others = [(delta or 0.0, error) for delta, error in found]
        deltas = [delta for delta, _ in others]
        mean = statistics.fmean(deltas)
        errors = math.hypot(error, math.sqrt(statistics.fmean(e * e for _, e in others)))
        spread = math.hypot(errors, statistics.stdev(deltas) if len(deltas) > 1 else 0.0)
        names = self.than[0] if len(self.than) == 1 else f"the mean of {len(self.than)} controls"
        return Verdict(
            name=f"{self.arm} loses less than {names}",
            held=mine < mean - 2 * spread,
            detail=f"{mine:+.4f} against {mean:+.4f} nats per token, spread {spread:.4f}",
        )


@spec
class NoDeadExpert:
    """Every expert of every layer of `arm`, the first arm, gets tokens of the evaluation text."""

    arm: str

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        if self.arm != study.arms[0].name:
            raise ConfigError(
                f"the routing of {self.arm!r} was not recorded.",
                f"Only the first arm's is: {study.arms[0].name!r}.",
            )
        layers = [layer for layer in study.specialisation or () if layer]
        shares = [[sum(column) for column in zip(*layer, strict=True)] for layer in layers]
        idle = sum(share == 0 for layer in shares for share in layer)
        least = min((min(layer) / sum(layer) for layer in shares), default=0.0)
        return Verdict(
            name=f"{self.arm} has no dead expert",
            held=bool(shares) and idle == 0,
            detail=f"{idle} idle; the least used one gets {100 * least:.2f} % of its layer",
        )


def arm_of(study: StudyResult, name: str) -> ArmResult:
    """An arm by name; ConfigError where the study has none."""
    try:
        return study.arm(name)
    except KeyError as error:
        raise ConfigError(
            f"an expectation names the arm {name!r}, which the study has not.",
            f"Its arms are {', '.join(repr(arm.name) for arm in study.arms)}.",
        ) from error


def _domain(arm: ArmResult, group: str) -> float:
    for domain in arm.domains:
        if domain.group == group:
            return domain.bits_per_byte
    raise ConfigError(
        f"an expectation names the group {group!r}, which the text has not.",
        f"Its groups are {', '.join(d.group for d in arm.domains)}.",
    )


def _range(low: float, high: float, unit: str) -> str:
    if low == -math.inf:
        return f"at most {high:g}{unit}"
    if high == math.inf:
        return f"at least {low:g}{unit}"
    return f"{low:g} to {high:g}{unit}"
