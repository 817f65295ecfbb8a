"""Windows that begin with their own first token."""

from __future__ import annotations

from moejax.core import spec
from moejax.data import EvalBatch, Tokenizer
from moejax.jobs.text import Text


@spec
class UnpromptedText(Text):
    """Text whose windows read no end-of-document token: the first token of each is not scored.

    Many published perplexities are taken so. A window of n tokens has n - 1 scored ones.
    """

    check = Text.check

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
        return shorter, sizes
