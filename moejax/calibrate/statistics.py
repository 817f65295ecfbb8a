"""What calibration found, and of what it found it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from moejax.calibrate.accumulators import Accumulator
from moejax.core import MoejaxError
from moejax.data import EvalBatch

LayerStatistics = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Statistics:
    """Statistics of every layer on one calibration text.

    layers: per layer, accumulator name -> array; empty where nothing applies. tokens: valid tokens
    seen. fingerprint: a hash of model, text, accumulators and jax version: equal statistics have it
    equal. text: what they were collected on.
    """

    layers: tuple[LayerStatistics, ...]
    tokens: int
    fingerprint: str
    text: tuple[EvalBatch, ...] = ()

    @staticmethod
    def nothing(layers: int) -> Statistics:
        """Of a model of so many layers, before anything was collected."""
        return Statistics(({},) * layers, 0, "")

    def of(self, layer: int, accumulator: Accumulator) -> np.ndarray:
        """One statistic of one layer; MoejaxError when it was not collected."""
        if accumulator.name not in self.layers[layer]:
            has = ", ".join(self.layers[layer]) or "none"
            raise MoejaxError(
                f"layer {layer} has no statistic {accumulator.name!r}.",
                f"It has {has}; a pass must name in needs() what it reads.",
            )
        return self.layers[layer][accumulator.name]

    def only(self, names: Collection[str]) -> Statistics:
        """The part under `names`."""
        layers = tuple({n: a for n, a in layer.items() if n in names} for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def joined(self, other: Statistics) -> Statistics:
        """Both, collected on the same text; the other's where both have one."""
        sizes = [(len(s.layers), s.tokens) for s in (self, other)]
        if sizes[0] != sizes[1] or not _same_text(self.text, other.text):
            raise MoejaxError(
                f"statistics of {sizes[0][0]} layers and {sizes[0][1]} tokens cannot join "
                f"those of {sizes[1][0]} layers and {sizes[1][1]} tokens of text.",
                "Collect them on the same text.",
            )
        layers = tuple({**a, **b} for a, b in zip(self.layers, other.layers, strict=True))
        both = hashlib.sha256(f"{self.fingerprint} {other.fingerprint}".encode()).hexdigest()
        return dataclasses.replace(self, layers=layers, fingerprint=both)


def _same_text(a: tuple[EvalBatch, ...], b: tuple[EvalBatch, ...]) -> bool:
    """Whether two texts hold the same tokens in the same batches."""
    if len(a) != len(b):
        return False
    return all(
        x is y
        or (
            x.group == y.group
            and np.array_equal(x.tokens_BxS, y.tokens_BxS)
            and np.array_equal(x.mask_BxS, y.mask_BxS)
        )
        for x, y in zip(a, b, strict=True)
    )
