"""What a training run says of itself: a line per step, fetched from the device in groups."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from moejax.core import RunError
from moejax.runs import Metrics, Progress
from moejax.runs.metrics import (
    LEARNING_RATE,
    LOAD_ENTROPY,
    LOAD_MAX,
    LOSS,
    TOKENS,
    TOKENS_PER_SECOND,
)
from moejax.train.step import StepMetrics

OBJECTIVE = "objective"  # loss and router losses
GRADIENT_NORM = "gradient_norm"  # before clipping
ROUTER_LOSS = "router_loss"  # a part per class
LOAD = "load"  # a part per layer: each expert's share of the assignments


class TrainLog:
    """Keeps what steps say on the device until `flush`, then writes it and shows it.

    layers: the model's indices of the MoE layers, for names such as `load_entropy/layer_3`.
    """

    def __init__(self, layers: Sequence[int], metrics: Metrics, bar: Progress):
        self._layers, self._metrics, self._bar = tuple(layers), metrics, bar
        self._kept: list[tuple[int, int, StepMetrics]] = []
        self._since = math.nan  # when the steps began whose rate comes next
        self._tokens = 0

    def add(self, step: int, tokens: int, said: StepMetrics) -> None:
        """Takes what step number `step` (from 1) said; `tokens` were in its batch."""
        self._kept.append((step, tokens, said))
        if math.isnan(self._since):
            jax.block_until_ready(said.loss)  # the first step compiles: its time says nothing
            self._since = time.perf_counter()
        else:
            self._tokens += tokens
        self._bar.advance(1)

    def flush(self) -> None:
        """Writes the lines of all steps since the last flush.

        Raises RunError naming the first step with a NaN or an infinity, after writing its line.
        """
        kept, self._kept = self._kept, []
        fetched = jax.device_get([said for _, _, said in kept])
        rate = self._rate()
        for (step, tokens, _), said in zip(kept, fetched, strict=True):
            row = self._row(said) | {TOKENS: step * tokens}
            last = step == kept[-1][0]
            if last:
                row |= self._loads(said)
                if rate is not None:
                    row[TOKENS_PER_SECOND] = rate
            self._metrics.write(step, **row)
            _check_finite(step, said)
            if last:
                shown = {name: row[name] for name in (LOSS, LOAD_MAX) if name in row}
                if rate is not None:
                    shown["tokens/s"] = round(rate)
                self._bar.advance(0, **shown)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Writes what evaluators found after `step` steps."""
        self._metrics.write(step, **values)
        self._bar.advance(0, **{name: value for name, value in values.items() if "/" not in name})

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in the block does not count as training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def _rate(self) -> float | None:
        now = time.perf_counter()
        seconds, tokens = now - self._since, self._tokens
        if not tokens:
            return None
        self._since, self._tokens = now, 0
        return tokens / seconds

    def _row(self, said: StepMetrics) -> dict[str, float]:
        row = {
            LOSS: float(said.loss),
            OBJECTIVE: float(said.objective),
            GRADIENT_NORM: float(said.gradient_norm),
            LEARNING_RATE: float(said.learning_rate),
        }
        for name, value in said.router_losses.items():
            row[f"{ROUTER_LOSS}/{name}"] = float(value)
        peaks = [float(c.max() / max(c.mean(), 1e-9)) for c in said.counts]
        for layer, counts_E, peak in zip(self._layers, said.counts, peaks, strict=True):
            row[f"{LOAD_MAX}/layer_{layer}"] = peak
            row[f"{LOAD_ENTROPY}/layer_{layer}"] = load_entropy(counts_E)
        return row | ({LOAD_MAX: max(peaks)} if peaks else {})

    def _loads(self, said: StepMetrics) -> dict[str, list[float]]:
        return {
            f"{LOAD}/layer_{layer}": (counts_E / max(counts_E.sum(), 1.0)).round(5).tolist()
            for layer, counts_E in zip(self._layers, said.counts, strict=True)
        }


def load_entropy(counts_E: Any) -> float:
    """Entropy of the experts' shares over log E: 1 is balanced, 0 is one expert for all."""
    counts_E = np.asarray(counts_E)
    if counts_E.size < 2 or not counts_E.sum():
        return 1.0
    share_E = counts_E[counts_E > 0] / counts_E.sum()
    return float(-(share_E * np.log(share_E)).sum() / math.log(counts_E.size))


def _check_finite(step: int, said: StepMetrics) -> None:
    for what, value in (("loss", said.loss), ("gradient", said.gradient_norm)):
        if not math.isfinite(value):
            raise RunError(
                f"the {what} is {float(value)} at step {step}.",
                "Lower the peak learning rate or warm up longer, in a new run folder. "
                "The checkpoints in this one are of earlier steps and good.",
            )
