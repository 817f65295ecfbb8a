"""What a compression study found: jobs write it to results.json, reports read nothing else.

Quantities: nll in nats, bits per byte = nll_sum / (ln 2 * bytes), bytes are exact bytes on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.core.atomic import read_json, write_json
from moejax.runs.records import from_record, to_record

AVERAGE = "average"


@dataclass(frozen=True)
class DomainScore:
    """How a model does on the held-out text of one group.

    kl: mean over tokens of KL(base || arm) in nats; agreement: share of tokens with base's top-1.
    delta_nll: mean over tokens of nll(arm) - nll(base) in nats, paired token by token.
    delta_stderr: standard error of that mean, with evaluation windows as clusters.
    These four are None for an arm without a base.
    """

    group: str
    tokens: int
    bytes: int
    nll_sum: float
    bits_per_byte: float
    perplexity: float
    kl: float | None = None
    agreement: float | None = None
    delta_nll: float | None = None
    delta_stderr: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class ArmResult:
    """One arm of a study: the base model or one recipe applied to it.

    base: name of the arm it is compared with. passes: what was done, in order.
    code_bits: mean bits per code of the compressed matrices; bits_per_weight: with their scales.
    stored_bytes: exact payload of the saved model; expert_bytes: the experts' part of it.
    average: over all held-out tokens of all groups, under the group name "average".
    """

    name: str
    base: str | None
    passes: tuple[str, ...]
    code_bits: float
    bits_per_weight: float
    stored_bytes: int
    expert_bytes: int
    parameters: int
    domains: tuple[DomainScore, ...]
    average: DomainScore
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """One stated expectation of a study and whether the numbers held it."""

    name: str
    held: bool
    detail: str


@dataclass(frozen=True)
class StudyResult:
    """Everything a report needs to know of a study beside the ledger and the metrics.

    protocol: text source, bytes per group, window, tokenizer and model hash, seeds, dtype, device.
    remarks: the author's, in the report below the verdicts.
    baselines: name of a general compressor -> group -> bits per byte of its held-out text.
    specialisation: per layer [groups, experts] the share of a group's assignments that each expert
        got (rows sum to 1, groups in the order of the arms' domains), None for a layer without
        experts; None as a whole where routing was not recorded.
    """

    protocol: dict[str, Any]
    arms: tuple[ArmResult, ...]
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    remarks: tuple[str, ...] = ()
    specialisation: tuple[tuple[tuple[float, ...], ...] | None, ...] | None = None

    def arm(self, name: str) -> ArmResult:
        """The arm of that name; KeyError when there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; nan and inf as strings."""
        return to_record(self)

    @staticmethod
    def from_json(data: Any, where: str = "results") -> StudyResult:
        """The inverse of `to_json`; RunError names the field that does not fit."""
        return from_record(StudyResult, data, where)

    def save(self, path: Path | str) -> None:
        """Writes the study whole or not at all; RunError names a field of a wrong type."""
        record = self.to_json()
        StudyResult.from_json(record, where="StudyResult")  # what is written can be read
        write_json(path, record)

    @staticmethod
    def load(path: Path | str) -> StudyResult:
        """The study in `path`; RunError when it is missing, damaged or of another version."""
        return StudyResult.from_json(read_json(path), where=Path(path).name)
