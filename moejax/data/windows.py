"""Evaluation windows: every token of a text is predicted exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from moejax.core.errors import DataError
from moejax.data.corpus import HELDOUT_BYTES, Corpus, heldout_documents
from moejax.data.tokenizer import Tokenizer


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


def heldout_windows(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    byte_count: int = HELDOUT_BYTES,
    groups: Iterable[str] | None = None,
) -> tuple[list[EvalBatch], dict[str, int]]:
    """The held-out text of all groups (or of `groups`) as windows, and each group's bytes of text.

    The bytes are those of `heldout_text`: a document's end counts as one. Raises DataError as
    `heldout_documents` does.
    """
    batches: list[EvalBatch] = []
    group_bytes: dict[str, int] = {}
    end = tokenizer.end_of_document
    for group in corpus.groups if groups is None else groups:
        documents = heldout_documents(corpus, group, byte_count)
        group_bytes[group] = sum(len(text.encode()) + 1 for text in documents)
        tokens = tokenizer.encode_documents(documents)
        batches += windows(tokens, length, batch, group=group, end_of_document=end)
    return batches, group_bytes
