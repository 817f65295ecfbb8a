"""Windows that begin with their own first token."""

from __future__ import annotations

from collections import Counter

from moejax.core import check_that, spec
from moejax.data import EvalBatch, Tokenizer
from moejax.jobs.text import Text


@spec
class UnpromptedText(Text):
    """Text whose windows read no end-of-document token: the first token of each is not scored.

    Many published perplexities are taken so. A window of n tokens has n - 1 scored ones. Of the
    bytes of a group those count that the scored tokens stand for, by their share of all tokens:
    bits per byte are over what was scored.
    """

    def check(self) -> None:
        Text.check(self)
        check_that(self.window >= 2, self, "window", "Of one token none is scored.")

    @property
    def windowing(self) -> str:
        """What a window sees and is scored on, in words."""
        return f"{super().windowing}, its first token read and not scored"

    def batches(self, tokenizer: Tokenizer | None = None) -> tuple[list[EvalBatch], dict[str, int]]:
        """As `Text.batches`, without the first column."""
        batches, sizes = super().batches(tokenizer)
        shorter = [
            EvalBatch(b.targets_BxS[:, :-1], b.targets_BxS[:, 1:], b.mask_BxS[:, 1:], b.group)
            for b in batches
        ]
        read, scored = _tokens(batches), _tokens(shorter)
        return shorter, {g: round(size * scored[g] / read[g]) for g, size in sizes.items()}


def _tokens(batches: list[EvalBatch]) -> Counter[str]:
    """Valid tokens of each group."""
    found: Counter[str] = Counter()
    for batch in batches:
        found[batch.group] += int(batch.mask_BxS.sum())
    return found
