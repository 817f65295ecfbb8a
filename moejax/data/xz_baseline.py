"""What a general-purpose compressor needs for a text: the bar that a language model must pass."""

from __future__ import annotations

import lzma

MOST_PRIMING_BYTES = 10_000_000


def xz_bits_per_byte(text: bytes, primed_with: bytes | None = None) -> float:
    """Bits per byte of `text` under `xz -9e`.

    primed_with: training text (its first 10 MB) that the compressor has seen before:
    size(training + text) - size(training). Compare figures of texts of one size only: the shorter
    a text, the worse the figure.
    """
    if not text:
        raise ValueError("bits per byte of an empty text")
    before = (primed_with or b"")[:MOST_PRIMING_BYTES]
    size = _xz_size(before + text) - (_xz_size(before) if before else 0)
    return 8 * size / len(text)


def _xz_size(text: bytes) -> int:
    # The dictionary of preset 9 is 64 MiB: all of the priming text stays in reach.
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
