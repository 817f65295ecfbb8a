"""What an accumulator is: a statistic of a layer that grows batch by batch from what it taps.

`init` gives the empty state of one layer, `update` folds one batch in, `merge` joins the states of
two streams, `finalize` turns a state into an array on the host. All but the last are pure and may
run inside jit; an accumulator is a spec, static there, and says which taps it needs. States are
sums and sorted samples, so that batches may come in any order and from any number of devices.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.core import Taps, spec
from moejax.core.taps import Request
from moejax.models import LayerSpec, ModelSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Which tokens a batch holds.

    mask_T: bool, False at padding. index_T: int32, the number of the token among the valid ones of
    the whole text, whatever the batch size; -1 at padding. group: uint32 scalar, crc32 of the name
    of the group that the batch is of.
    """

    mask_T: Array
    index_T: Array
    group: Array


@runtime_checkable
class Accumulator(Protocol):
    """One statistic of a layer. name: its key in `Statistics`; request: the taps it reads."""

    @property
    def name(self) -> str: ...

    @property
    def request(self) -> Request: ...

    def init(self, layer: LayerSpec, model: ModelSpec) -> Any:
        """The empty state of a layer, a pytree of arrays; None where it says nothing."""
        ...

    def update(self, state: Any, found: Taps, tokens: Tokens) -> Any:
        """The state with one batch more, in place inside jit where the state is donated."""
        ...

    def merge(self, a: Any, b: Any) -> Any:
        """The state of both streams together."""
        ...

    def finalize(self, state: Any) -> np.ndarray:
        """The statistic, finite also where nothing was seen."""
        ...


class Sums:
    """What accumulators share whose state is a pytree of sums."""

    def merge(self, a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)


def mean(total: Array, count: Array) -> np.ndarray:
    """total / count in float64, 0 where nothing was counted."""
    return np.asarray(total, np.float64) / max(float(count), 1.0)


@spec
class TokenCount(Sums):
    """Valid tokens that the layer saw: int64 scalar."""

    name = "token_count"
    request = frozenset()

    def init(self, layer: LayerSpec, model: ModelSpec) -> Array:
        return jnp.zeros((), jnp.int32)

    def update(self, state: Array, found: Taps, tokens: Tokens) -> Array:
        return state + tokens.mask_T.sum(dtype=jnp.int32)

    def finalize(self, state: Array) -> np.ndarray:
        return np.asarray(state, np.int64)
