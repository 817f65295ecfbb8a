"""The text that a job evaluates or calibrates on."""

from __future__ import annotations

import functools

from moejax.core import DataError, check_that, spec
from moejax.data import (
    MOST_PRIMING_BYTES,
    Corpus,
    EvalBatch,
    HeldoutSample,
    Split,
    Tokenizer,
    heldout_documents,
    shipped_tokenizer,
    windows,
    xz_bits_per_byte,
)
from moejax.runs import progress


@spec
class Text:
    """`bytes_per_group` of a split of every group's text, from the first document on that its first
    `skip_bytes` hold nothing of.

    window: tokens per window, which sees nothing of the windows before it. batch: windows at a
    time; no figure depends on it.
    """

    corpus: Corpus = HeldoutSample()
    split: Split = "heldout"
    bytes_per_group: int = 262_144
    skip_bytes: int = 0
    window: int = 256
    batch: int = 16

    def check(self) -> None:
        for field in ("bytes_per_group", "window", "batch"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        check_that(self.skip_bytes >= 0, self, "skip_bytes", "Use 0 to start at the beginning.")

    @property
    def windowing(self) -> str:
        """What a window sees and is scored on, in words."""
        return f"{self.window} tokens, each window on its own"

    def documents(self, group: str) -> tuple[str, ...]:
        """The documents of a group; DataError where not even a line fits."""
        size = self.bytes_per_group
        found = _documents(self.corpus, group, self.split, self.skip_bytes, size)
        if not found:
            raise DataError(
                f"{type(self).__name__}.bytes_per_group = {size} has no room for the next line of "
                f"{group!r}.",
                "Ask for more bytes; a document is cut at the end of a line.",
            )
        return found

    def span(self, group: str) -> range:
        """Which documents of the split these are, counted from its first; the last may be cut."""
        first = _skipped(self.corpus, group, self.split, self.skip_bytes)
        return range(first, first + len(self.documents(group)))

    def batches(self, tokenizer: Tokenizer | None = None) -> tuple[list[EvalBatch], dict[str, int]]:
        """Windows of all groups, and bytes of text per group; default is the shipped tokenizer."""
        tokenizer = shipped_tokenizer() if tokenizer is None else tokenizer
        batches: list[EvalBatch] = []
        sizes: dict[str, int] = {}
        for group in progress(self.corpus.groups, "read text", "groups"):
            documents = self.documents(group)
            sizes[group] = sum(len(text.encode()) + 1 for text in documents)
            tokens = tokenizer.encode_documents(documents)
            end = tokenizer.end_of_document
            batches += windows(tokens, self.window, self.batch, group=group, end_of_document=end)
        return batches, sizes

    def xz(self, priming: Corpus | None = None) -> dict[str, float]:
        """Bits per byte of each group's text under xz -9e, which has read `priming` before."""
        return {
            group: xz_bits_per_byte(
                "".join(f"{t}\n" for t in self.documents(group)).encode(),
                _beginning(priming, group) if priming else None,
            )
            for group in self.corpus.groups
        }


@functools.lru_cache(maxsize=32)
def _documents(corpus: Corpus, group: str, split: Split, skip: int, size: int) -> tuple[str, ...]:
    first = _skipped(corpus, group, split, skip)
    return heldout_documents(corpus, group, size, split, first=first)


def _skipped(corpus: Corpus, group: str, split: Split, skip: int) -> int:
    """How many documents the first `skip` bytes hold something of."""
    return len(heldout_documents(corpus, group, skip, split)) if skip else 0


def _beginning(corpus: Corpus, group: str) -> bytes:
    """The first training text of a group, as much as xz_bits_per_byte looks at."""
    taken, size = [], 0
    for text in corpus.documents(group, "train"):
        taken.append(f"{text}\n".encode())
        size += len(taken[-1])
        if size >= MOST_PRIMING_BYTES:
            break
    return b"".join(taken)
