"""The text of a calibration: checked batches, and the number of every token in it."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moejax.calibrate.groups import group_id
from moejax.core import DataError
from moejax.data import EvalBatch


@dataclass(frozen=True)
class CalibrationText:
    """Batches, and for each the number of its first valid token in the whole text."""

    batches: tuple[EvalBatch, ...]
    starts: tuple[int, ...]
    tokens: int

    @functools.cached_property
    def sha256(self) -> str:
        """Of tokens, masks, groups and how they are cut."""
        digest = hashlib.sha256()
        for batch in self.batches:
            digest.update(f"{batch.tokens_BxS.shape} {batch.group}".encode())
            for array in (batch.tokens_BxS, batch.mask_BxS):
                digest.update(array.tobytes())
        return digest.hexdigest()

    def joined(self, other: CalibrationText) -> CalibrationText:
        """Two parts of one text, in its order; DataError where they overlap."""
        parts = zip(self.starts + other.starts, self.batches + other.batches, strict=True)
        ordered = sorted(parts, key=lambda part: part[0])
        for (start, batch), (following, _) in itertools.pairwise(ordered):
            if start + int(batch.mask_BxS.sum()) > following:
                raise DataError(
                    f"two parts of the calibration text both hold token {following}.",
                    "Give collect_part the number of its first token in the whole text.",
                )
        starts, batches = zip(*ordered, strict=True)
        return CalibrationText(batches, starts, self.tokens + other.tokens)

    def group(self, number: int) -> int:
        """`Tokens.group` of a batch."""
        return group_id(self.batches[number].group)

    def check_vocabulary(self, vocab: int) -> None:
        """DataError for a token id that the model has not."""
        for batch in self.batches:
            ids = batch.tokens_BxS
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
                raise DataError(
                    f"the calibration text holds token ids from {ids.min()} to {ids.max()}, "
                    f"the vocabulary has {vocab}.",
                    "Calibrate on text of the model's own tokenizer.",
                )


def calibration_text(batches: Iterable[EvalBatch], first_token: int = 0) -> CalibrationText:
    """The text of some batches; first_token: where it begins in the whole text.

    DataError for text without valid tokens.
    """
    taken: list[EvalBatch] = []
    starts: list[int] = []
    tokens = 0
    for batch in batches:
        taken.append(
            batch._replace(
                tokens_BxS=np.ascontiguousarray(batch.tokens_BxS, np.int32),
                mask_BxS=np.ascontiguousarray(batch.mask_BxS, bool),
            )
        )
        starts.append(first_token + tokens)
        tokens += int(taken[-1].mask_BxS.sum())
    if not tokens:
        raise DataError("there is no text to calibrate on.", "Give a batch with valid tokens.")
    return CalibrationText(tuple(taken), tuple(starts), tokens)
