"""Hashes of all that decides a statistic: model, text, accumulator, code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import weights
from moejax.calibrate.accumulators import Accumulator
from moejax.calibrate.text import CalibrationText
from moejax.core import compat, to_json
from moejax.files import content_hash
from moejax.models import DecoderLM
from moejax.models.block import run_length

CODE_VERSION = 1  # to be raised when an accumulator or a layer computes something else


def model_hash(model: DecoderLM) -> str:
    """SHA-256 of spec, formats and every leaf: what decides the model's function.

    The same whatever runs the layers form. One weight of one layer is copied at a time.
    """
    digest = hashlib.sha256(json.dumps(to_json(model.spec)).encode())
    for name, value in _variables(model):
        if not name.startswith("runs."):
            _add(digest, name, value)
    for run in model.runs:
        of_layers = [hashlib.sha256() for _ in range(run_length(run))]
        for name, stacked in _variables(run):
            for index, of_layer in enumerate(of_layers):
                _add(of_layer, name, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
        for of_layer in of_layers:
            digest.update(of_layer.digest())
    return digest.hexdigest()


def fingerprint(
    model: str, text: CalibrationText, accumulators: Sequence[Accumulator], dtype: Any
) -> str:
    """Of all that decides some statistics; model: its `model_hash`."""
    what = [to_json(tuple(accumulators)), str(jnp.dtype(dtype)), jax.__version__, CODE_VERSION]
    return content_hash(model, text.sha256, what)


def statistic_key(
    model: str, text: CalibrationText, accumulator: Accumulator, layer: int, dtype: Any
) -> str:
    """Of one statistic of one layer."""
    return content_hash(fingerprint(model, text, (accumulator,), dtype), layer)


def _variables(module: nnx.Module) -> list[tuple[str, Any]]:
    """Names and values of a module's variables, by name."""
    found = nnx.iter_graph(module)
    named = {
        ".".join(str(part) for part in path): compat.read(node)
        for path, node in found
        if isinstance(node, nnx.Variable)
    }
    return sorted(named.items(), key=lambda item: item[0])


def _add(digest: Any, name: str, value: Any) -> None:
    digest.update(json.dumps([name, weights.format_meta(value)]).encode())
    for leaf in jax.tree.leaves(value):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
