"""Validation text: whole documents of a split, cut into windows, with their exact size in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from moejax.core import DataError
from moejax.data import EvalBatch, Tokenizer, TokenStore, windows


@dataclasses.dataclass(frozen=True)
class ValidationText:
    """Windows of all groups. group_bytes: bytes of each group's text, a newline per document."""

    batches: tuple[EvalBatch, ...]
    group_bytes: Mapping[str, int]


def validation_text(
    store: TokenStore, tokenizer: Tokenizer, byte_count: int, length: int, batch: int
) -> ValidationText:
    """The first documents of each group that fit into `byte_count` bytes, in windows of `length`.

    The end of a document is a token and counts as one byte, as in `data.heldout_text`.
    Raises DataError for a group without a document that fits.
    """
    batches: list[EvalBatch] = []
    group_bytes = {}
    for group in store.groups:
        tokens, group_bytes[group] = _documents(store, tokenizer, group, byte_count)
        cut = windows(tokens, length, batch, group=group, end_of_document=store.end_of_document)
        batches.extend(cut)
    return ValidationText(tuple(batches), group_bytes)


def _documents(
    store: TokenStore, tokenizer: Tokenizer, group: str, byte_count: int
) -> tuple[np.ndarray, int]:
    """Tokens of the documents, each with its end, and their bytes."""
    tokens = store.tokens(group)
    taken: list[np.ndarray] = []
    start, room = 0, byte_count
    for end in np.flatnonzero(tokens == store.end_of_document):
        document, start = tokens[start : end + 1], end + 1
        if len(document) > room:  # a token is at least one byte
            continue
        size = len(tokenizer.decode(document[:-1]).encode()) + 1
        if size <= room:
            taken.append(document)
            room -= size
        if room <= byte_count // 100:
            break
    if not taken:
        raise DataError(
            f"group {group!r} has no {store.split} document that fits into {byte_count} bytes.",
            "Evaluate on more bytes, or give the group more text.",
        )
    return np.concatenate(taken), byte_count - room
