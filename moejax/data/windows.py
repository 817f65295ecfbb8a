"""Evaluation windows: every token of a text is predicted exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moejax.core.errors import DataError


class EvalBatch(NamedTuple):
    """Rows of a text. tokens_BxS, targets_BxS: int32 [B, S]; mask_BxS: bool, targets that count."""

    tokens_BxS: np.ndarray
    targets_BxS: np.ndarray
    mask_BxS: np.ndarray
    group: str


def windows(
    tokens: np.ndarray, length: int, batch: int, *, group: str = "", end_of_document: int = 0
) -> Iterator[EvalBatch]:
    """Cuts `tokens` [n] into windows of `length` targets each, `batch` windows at a time.

    A window reads the end-of-document id and then its own targets but the last, so that it sees
    nothing of the windows before it. The last batch is filled up with rows whose mask is False.
    """
    if length < 1 or batch < 1:
        raise DataError(
            f"windows of length {length} in batches of {batch} hold no token.",
            "Both are at least 1.",
        )
    size = batch * length
    for start in range(0, len(tokens), size):
        part = np.asarray(tokens[start : start + size], np.int32)
        targets = np.full(size, end_of_document, np.int32)
        targets[: len(part)] = part
        targets_BxS = targets.reshape(batch, length)
        mask_BxS = (np.arange(size) < len(part)).reshape(batch, length)
        tokens_BxS = np.roll(targets_BxS, 1, axis=1)
        tokens_BxS[:, 0] = end_of_document
        yield EvalBatch(tokens_BxS, targets_BxS, mask_BxS, group)
