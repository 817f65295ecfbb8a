"""Some windows of a calibration text, for what measures the loss many times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moejax.core import MoejaxError
from moejax.data import EvalBatch


def spread(text: Sequence[EvalBatch], windows: int, owner: str) -> list[EvalBatch]:
    """So many windows, evenly spread over the text, in batches of the size that the text has.

    Texts lie one group after the other: the first windows alone would know of one group only.
    """
    rows = [(batch, row) for batch in text for row in np.flatnonzero(batch.mask_BxS.any(1))]
    if not rows:
        raise MoejaxError(f"{owner} has no calibration text.", "Calibrate on some text.")
    chosen = np.linspace(0, len(rows) - 1, min(windows, len(rows))).round().astype(int)
    height = min(len(chosen), max(len(batch.mask_BxS) for batch in text))
    length = max(batch.mask_BxS.shape[1] for batch in text)
    found = []
    for first in range(0, len(chosen), height):
        tokens, targets, mask = (
            np.zeros((height, length), np.asarray(part).dtype) for part in text[0][:3]
        )
        for place, number in enumerate(chosen[first : first + height]):
            batch, row = rows[number]
            for part, given in zip((tokens, targets, mask), batch[:3], strict=True):
                part[place, : given.shape[1]] = given[row]
        found.append(EvalBatch(tokens, targets, mask, "all"))
    return found
