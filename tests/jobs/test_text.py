"""The text of a job: its windows, and the bytes that they are of."""

import numpy as np
import pytest

from moejax.core import DataError
from moejax.data import HeldoutSample, heldout_text, shipped_tokenizer
from moejax.jobs.text import Text


def test_windows_cover_the_text_whose_bytes_they_name():
    """Catches bits per byte over other bytes than the compressor's, and documents that run on."""
    batches, group_bytes = Text(bytes_per_group=3000, window=32, batch=4).batches()
    corpus, tokenizer = HeldoutSample(), shipped_tokenizer()
    for group in corpus.groups:
        text = heldout_text(corpus, group, 3000)
        assert group_bytes[group] == len(text.encode())
        targets = [b.targets_BxS[b.mask_BxS] for b in batches if b.group == group]
        ids = np.concatenate(targets)
        assert tokenizer.decode(ids).replace("<|endoftext|>", "\n") == text
    assert {batch.group for batch in batches} == set(corpus.groups)


class LongAndShort:
    """A document of 500 bytes, then one of 60, twice."""

    groups = ("g",)
    fingerprint = "long and short"

    def documents(self, group, split):
        for name in "abcd":
            yield "\n".join(f"{name}{line:03d}" for line in range(100 if name in "ac" else 12))


def test_a_text_behind_another_has_its_own_bytes():
    """Catches a text that ends where a document does which the text before it was cut in: a group
    without a byte to calibrate on, or with less than was asked for."""
    before = Text(corpus=LongAndShort(), bytes_per_group=100)
    after = Text(corpus=LongAndShort(), bytes_per_group=100, skip_bytes=100)
    assert [len(text) for text in before.documents("g")] == [99]
    assert [text[0] for text in after.documents("g")] == ["b", "c"]
    assert sum(len(text) + 1 for text in after.documents("g")) == 100
    assert (before.span("g"), after.span("g")) == (range(1), range(1, 3))


def test_too_few_bytes_for_a_line_are_an_error():
    """Catches a text without a token, which only a later floor complains of, naming no field."""
    for text in (Text(bytes_per_group=10), Text(bytes_per_group=10, skip_bytes=4000)):
        with pytest.raises(DataError, match=r"Text\.bytes_per_group = 10 has no room"):
            text.batches()
