"""What calibration found, and of what it found it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from moejax.calibrate.accumulators import Accumulator
from moejax.core import MoejaxError

LayerStatistics = dict[str, np.ndarray]


@dataclass(frozen=True)
class Statistics:
    """Statistics of every layer on one calibration text.

    layers: per layer, accumulator name -> array; empty where nothing applies. tokens: valid tokens
    seen. fingerprint: a hash of model, text, accumulators and jax version: equal statistics have it
    equal.
    """

    layers: tuple[LayerStatistics, ...]
    tokens: int
    fingerprint: str

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
        if len(self.layers) != len(other.layers) or self.tokens != other.tokens:
            raise MoejaxError(
                f"statistics of {len(self.layers)} layers and {self.tokens} tokens cannot join "
                f"those of {len(other.layers)} layers and {other.tokens} tokens.",
                "Collect them on the same text.",
            )
        layers = tuple(a | b for a, b in zip(self.layers, other.layers, strict=True))
        both = hashlib.sha256(f"{self.fingerprint} {other.fingerprint}".encode()).hexdigest()
        return Statistics(layers, self.tokens, both)
