"""Streams text through a model and accumulates statistics on the device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax import models, weights
from moejax.calibrate.accumulators import Accumulator
from moejax.calibrate.statistics import Statistics
from moejax.core import DataError, MoejaxError, to_json
from moejax.data import EvalBatch
from moejax.models import DecoderLM
from moejax.runs import Progress

States = dict[str, tuple[Any, ...]]  # accumulator name -> state per layer


def collect(
    model: DecoderLM,
    batches: Iterable[EvalBatch],
    accumulators: Sequence[Accumulator],
    *,
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of `model` on the valid tokens of `batches`, read once.

    Only the taps that the accumulators request are returned by the layers. dtype: of activations.
    progress: advances by one per batch. Raises DataError for text without tokens, MoejaxError for a
    statistic that is not finite.
    """
    chosen = tuple(dict.fromkeys(accumulators))
    graphdef, state = nnx.split(model)
    states: States = {
        a.name: tuple(a.init(layer, model.spec) for layer in model.spec.layers) for a in chosen
    }
    tokens, text = 0, hashlib.sha256()
    for batch in batches:
        tokens_BxS = np.asarray(batch.tokens_BxS, np.int32)
        mask_BxS = np.asarray(batch.mask_BxS, bool)
        if tokens_BxS.size and not 0 <= tokens_BxS.min() <= tokens_BxS.max() < model.spec.vocab:
            raise DataError(
                f"the calibration text holds token ids from {tokens_BxS.min()} to "
                f"{tokens_BxS.max()}, the vocabulary has {model.spec.vocab}.",
                "Calibrate on text of the model's own tokenizer.",
            )
        states = _update(
            graphdef, state, states, tokens_BxS, mask_BxS, accumulators=chosen, dtype=dtype
        )
        tokens += int(mask_BxS.sum())
        for array in (tokens_BxS, mask_BxS):
            text.update(f"{array.shape}".encode() + array.tobytes())
        if progress is not None:
            progress.advance(1)
    if not tokens:
        raise DataError("there is no text to calibrate on.", "Give a batch with valid tokens.")
    layers = tuple(
        {a.name: a.finalize(states[a.name][i]) for a in chosen if states[a.name][i] is not None}
        for i in range(len(model.spec.layers))
    )
    for index, layer in enumerate(layers):
        for name, value in layer.items():
            if not np.isfinite(value).all():
                raise MoejaxError(
                    f"{name} of layer {index} is not finite.",
                    "The model overflows on the calibration text: check its weights.",
                )
    what = json.dumps([to_json(chosen), str(jnp.dtype(dtype)), jax.__version__])
    parts = (model_hash(model), text.hexdigest(), what)
    return Statistics(layers, tokens, hashlib.sha256("\n".join(parts).encode()).hexdigest())


def model_hash(model: DecoderLM) -> str:
    """SHA-256 of spec, formats and every leaf: what decides the model's function."""
    digest = hashlib.sha256(json.dumps(to_json(model.spec)).encode())
    for name, value in models.parameters(model).items():
        digest.update(json.dumps([name, weights.format_meta(value)]).encode())
        for leaf in jax.tree.leaves(value):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@partial(
    jax.jit, static_argnames=("graphdef", "accumulators", "dtype"), donate_argnames=("states",)
)
def _update(
    graphdef: Any,
    state: Any,
    states: States,
    tokens_BxS: Array,
    mask_BxS: Array,
    *,
    accumulators: tuple[Accumulator, ...],
    dtype: Any,
) -> States:
    """The states with one batch more. Logits are not used, so the compiler leaves them out."""
    request = frozenset().union(*(a.request for a in accumulators))
    model = nnx.merge(graphdef, state)
    output = models.forward(model, tokens_BxS, mask_BxS=mask_BxS, request=request, dtype=dtype)
    mask_T = mask_BxS.reshape(-1)
    return {
        a.name: tuple(
            s if s is None else a.update(s, found, mask_T)
            for s, found in zip(states[a.name], output.taps, strict=True)
        )
        for a in accumulators
    }
