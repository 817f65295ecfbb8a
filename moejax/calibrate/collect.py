"""The plain function: a text, a model, statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from moejax.calibrate.accumulators import Accumulator
from moejax.calibrate.calibration import Calibration
from moejax.calibrate.statistics import Statistics
from moejax.data import EvalBatch
from moejax.models import DecoderLM
from moejax.runs import Progress


def collect(
    model: DecoderLM,
    batches: Iterable[EvalBatch],
    accumulators: Sequence[Accumulator],
    *,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of `model` on the valid tokens of `batches`: `Calibration` used once."""
    return Calibration(batches, dtype=dtype)(model, accumulators, progress=progress)
