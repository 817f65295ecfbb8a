"""What a study expects of arms against each other: methods against controls of equal bytes."""

from __future__ import annotations

import math

import numpy as np

from moejax.core import ConfigError, check_that, spec
from moejax.jobs.expectations import arm_of
from moejax.runs import ArmResult, Ledger, StudyResult, Verdict


@spec
class DamageRatio:
    """`arm` loses at most `at_most` times the nats per token that `than` loses, of one base.

    The detail says where the difference is within two standard errors: then the verdict is a point
    estimate and no more.
    """

    arm: str
    than: str
    at_most: float = 1.0

    def check(self) -> None:
        check_that(self.at_most > 0, self, "at_most", "Give a ratio above 0.")

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        (ours, our_error), (theirs, their_error) = _damages(study, (self.arm, self.than))
        detail = f"{ours:.4f} against {theirs:.4f} nats per token"
        # First order: both damages are means over the same windows, taken as independent.
        if theirs > 0:
            ratio = ours / theirs
            error = math.hypot(our_error, ratio * their_error) / theirs
            detail += f", a ratio of {ratio:.3f} ± {error:.3f}"
        gap = abs(ours - self.at_most * theirs)
        if gap <= 2 * math.hypot(our_error, self.at_most * their_error):
            detail += ", within two standard errors of the limit"
        return Verdict(
            name=f"{self.arm} loses at most {self.at_most:g} of what {self.than} loses",
            held=ours <= self.at_most * theirs,
            detail=detail,
        )


@spec
class BeatsControls:
    """`arm` loses less than every one of `controls`, arms of no more and no fewer stored bytes.

    spare: how much of the expert bytes a control may lie beside `arm`'s.
    """

    arm: str
    controls: tuple[str, ...]
    spare: float = 0.005

    def check(self) -> None:
        check_that(len(self.controls) > 0, self, "controls", "Name the arms to beat.")

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        bytes_of = [arm_of(study, name).expert_bytes for name in (self.arm, *self.controls)]
        if any(abs(size / bytes_of[0] - 1) > self.spare for size in bytes_of):
            raise ConfigError(
                f"{self.arm} and its controls have expert bytes {bytes_of}.",
                "Give all of them the same budget: only equal bytes compare.",
            )
        (ours, _), *others = _damages(study, (self.arm, *self.controls))
        losses = np.array([loss for loss, _ in others])
        spread = losses.std(ddof=1) if len(losses) > 1 else 0.0
        return Verdict(
            name=f"{self.arm} loses less than each of {len(losses)} controls of equal bytes",
            held=bool(ours < losses.min()),
            detail=f"{ours:.4f} nats per token; controls {losses.mean():.4f}, standard deviation "
            f"{spread:.4f}, least {losses.min():.4f}",
        )


@spec
class LowersOutputError:
    """For this share of the calibrated expert matrices of `arm`, its method lowers the output error
    on calibration rows below round-to-nearest's."""

    arm: str
    share: float = 0.95

    def __call__(self, study: StudyResult, ledger: Ledger) -> Verdict:
        rows = [
            row
            for row in ledger.last(self.arm).values()
            if row.calibrated and row.output_error is not None and row.nearest_error is not None
        ]
        lower = [row.output_error < row.nearest_error for row in rows]  # type: ignore[operator]
        found = float(np.mean(lower)) if lower else 0.0
        return Verdict(
            name=f"{self.arm} lowers the output error of {100 * self.share:g} % of its matrices",
            held=found >= self.share,
            detail=f"{sum(lower)} of {len(lower)} calibrated matrices, {100 * found:.1f} %",
        )


def _damages(study: StudyResult, names: tuple[str, ...]) -> list[tuple[float, float]]:
    """Nats per token lost against the base, and the standard error, NaN where it is not known, of
    arms that share a base."""
    arms = [arm_of(study, name) for name in names]
    if len({arm.base for arm in arms}) > 1 or arms[0].base is None:
        raise ConfigError(
            f"the bases of {', '.join(names)} are {', '.join(str(arm.base) for arm in arms)}.",
            "Compare arms that share one base.",
        )
    return [_damage(arm) for arm in arms]


def _damage(arm: ArmResult) -> tuple[float, float]:
    average = arm.average
    assert average.delta_nll is not None
    return average.delta_nll, math.nan if average.delta_stderr is None else average.delta_stderr
