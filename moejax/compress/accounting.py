"""Bytes and bits of a model as it will be saved: exact, scales and zeros included."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moejax import weights
from moejax.compress.passes import Weight
from moejax.compress.patterns import BIAS, OUTSIDE
from moejax.models import DecoderLM, parameters, retyped
from moejax.runs import Ledger


@dataclass(frozen=True)
class Account:
    """What a saved model takes.

    stored_bytes: its payload; expert_bytes: the routed experts' part of it. parameters: how many
    numbers it stands for. code_bits, bits_per_weight: of the matrices asked for, without and with
    scales and zeros, means over weights.
    """

    stored_bytes: int
    expert_bytes: int
    parameters: int
    code_bits: float
    bits_per_weight: float


def account(model: DecoderLM, matrices: Collection[str] = (), dtype: Any = jnp.bfloat16) -> Account:
    """The account of a model whose plain arrays are saved in `dtype`; abstract models will do.

    matrices: canonical names that the bits are of, such as those a recipe `touched`, as far as the
    model still has them; where there are none, all expert matrices, or all parameters of a model
    without experts.
    """
    named = parameters(model)
    sizes = payload(model, dtype)
    experts = [name for name in named if ".moe.experts." in name]
    chosen = (
        [name for name in matrices if name in named]
        or [n for n in experts if not n.endswith(BIAS)]
        or list(named)
    )
    counts = {name: math.prod(weights.shape(named[name])) for name in chosen}
    total = sum(counts.values())
    bits = sum(counts[name] * stored_code_bits(named[name], dtype, name) for name in chosen)
    return Account(
        stored_bytes=sum(sizes.values()),
        expert_bytes=sum(sizes[name] for name in experts),
        parameters=sum(math.prod(weights.shape(w)) for w in named.values() if _is_weight(w)),
        code_bits=bits / total,
        bits_per_weight=8 * sum(sizes[name] for name in chosen) / total,
    )


def payload(model: DecoderLM, dtype: Any = jnp.bfloat16) -> dict[str, int]:
    """Canonical name -> bytes on disk; their sum is `checkpoint.payload_bytes(model, dtype)`."""
    return {name: stored_bytes(weight, dtype, name) for name, weight in parameters(model).items()}


def stored_bytes(weight: Weight, dtype: Any, name: str = "") -> int:
    """Bytes of a weight once it is saved; `name` as in `models.retyped`."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(_saved(weight, dtype, name))
    )


def stored_code_bits(weight: Weight, dtype: Any, name: str = "") -> float:
    """Bits of one weight's code once it is saved."""
    return float(weights.code_bits(_saved(weight, dtype, name)))


def touched(ledger: Ledger, arm: str) -> tuple[str, ...]:
    """Canonical names of the matrices that the passes of an arm have rows for."""
    places = {(row.layer, row.matrix): None for row in ledger if row.arm == arm}
    return tuple(m if layer == OUTSIDE else f"layers.{layer}.{m}" for layer, m in places)


def _saved(weight: Weight, dtype: Any, name: str) -> Weight:
    """The shapes that saving writes."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weight)
    return retyped({name: shapes}, dtype)[name]


def _is_weight(value: Any) -> bool:
    return isinstance(value, jax.Array | jax.ShapeDtypeStruct | weights.Format)
