"""The compressor baseline: bits of the text alone, and after other text."""

import random

import pytest

from moejax.data import xz_bits_per_byte


def test_noise_takes_eight_bits_and_repetition_none():
    """Catches bytes for bits, and a ratio taken the other way round."""
    assert xz_bits_per_byte(random.Random(0).randbytes(50_000)) == pytest.approx(8, rel=0.01)
    assert xz_bits_per_byte(b"a" * 50_000) < 0.1


def test_priming_pays_for_the_text_alone():
    """Catches a figure that includes the priming text, and a dictionary too small to reach it."""
    noise = random.Random(1)
    text, before = noise.randbytes(20_000), noise.randbytes(300_000)
    assert xz_bits_per_byte(text, primed_with=text + before) < 0.2
    assert xz_bits_per_byte(text, primed_with=before) == pytest.approx(8, rel=0.02)


def test_empty_text_has_no_figure():
    """Catches a division by zero that shows up as a perfect score."""
    with pytest.raises(ValueError, match="empty"):
        xz_bits_per_byte(b"")
