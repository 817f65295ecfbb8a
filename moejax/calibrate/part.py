"""Calibration shared by processes: each takes a part of the text, and the parts are joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moejax.calibrate.accumulators import Accumulator
from moejax.calibrate.fingerprint import fingerprint, model_hash
from moejax.calibrate.statistics import Statistics
from moejax.calibrate.stream import LayerStream, States, finalized, release
from moejax.calibrate.text import CalibrationText, calibration_text
from moejax.core import MoejaxError
from moejax.data import EvalBatch
from moejax.models import DecoderLM
from moejax.models.decoder import layer
from moejax.runs import Progress


@dataclass(frozen=True)
class Part:
    """What was found on a part of a text, not finalized: sums and samples that still join.

    layers: states of every layer, on the host. model: its `model_hash`.
    """

    layers: tuple[States, ...]
    text: CalibrationText
    model: str
    dtype: Any

    def joined(self, other: Part) -> Part:
        """Both parts, of one model and text, with the same accumulators."""
        same = [tuple(map(tuple, part.layers)) for part in (self, other)]
        if self.model != other.model or same[0] != same[1]:
            raise MoejaxError(
                "two parts of a calibration are of different models or accumulators.",
                "Collect every part with the same ones.",
            )
        text = self.text.joined(other.text)
        layers = tuple(
            {a: jax.device_get(jax.jit(a.merge)(mine[a], theirs[a])) for a in mine}
            for mine, theirs in zip(self.layers, other.layers, strict=True)
        )
        return Part(layers, text, self.model, self.dtype)

    def statistics(self) -> Statistics:
        """The statistics of what was joined so far."""
        layers = tuple(
            {a.name: finalized(a, state, index) for a, state in states.items()}
            for index, states in enumerate(self.layers)
        )
        chosen = tuple(dict.fromkeys(a for states in self.layers for a in states))
        mark = fingerprint(self.model, self.text, chosen, self.dtype)
        return Statistics(layers, self.text.tokens, mark, self.text.batches)


def collect_part(
    model: DecoderLM,
    batches: Iterable[EvalBatch],
    accumulators: Sequence[Accumulator],
    *,
    first_token: int = 0,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
) -> Part:
    """What one process finds on its batches; it holds the sums of all layers in host memory.

    first_token: how many valid tokens of the whole text come before these batches.
    """
    text = calibration_text(batches, first_token)
    layers: list[States] = []
    with LayerStream(model, text, dtype=dtype, progress=progress) as stream:
        for index in range(len(model.spec.layers)):
            block = layer(model, index)
            states = stream.accumulate(block, accumulators, onward=True)
            layers.append({a: jax.device_get(state) for a, state in states.items()})
            release(block)
    return Part(tuple(layers), text, model_hash(model), dtype)
