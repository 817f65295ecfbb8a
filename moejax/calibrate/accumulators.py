"""Accumulators: statistics of a layer that grow batch by batch from what the layer taps.

`init` gives the empty state of one layer, `update` folds one batch in, `merge` joins the states of
two streams, `finalize` turns a state into an array on the host. All but the last are pure and may
run inside jit; an accumulator is a spec, static there, and says which taps it needs.
"""

from __future__ import annotations

import abc
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.core import Taps, spec, taps
from moejax.core.taps import Request
from moejax.models import LayerSpec, ModelSpec
from moejax.moe import MoESpec, Routing


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

    def update(self, state: Any, found: Taps, mask_T: Array) -> Any:
        """The state with one batch more; mask_T is False at padding."""
        ...

    def merge(self, a: Any, b: Any) -> Any:
        """The state of both streams together."""
        ...

    def finalize(self, state: Any) -> np.ndarray:
        """The statistic."""
        ...


class _PerExpert(abc.ABC):
    """What one number per router expert shares: a state [E] of sums."""

    dtype: Any
    request: Request = frozenset({taps.ROUTING})

    @abc.abstractmethod
    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        """[E] of one batch alone."""

    def init(self, layer: LayerSpec, model: ModelSpec) -> Array | None:
        return jnp.zeros(layer.ffn.experts, self.dtype) if isinstance(layer.ffn, MoESpec) else None

    def update(self, state: Array, found: Taps, mask_T: Array) -> Array:
        return self.merge(state, self.of_batch(found[taps.ROUTING], mask_T).astype(self.dtype))

    def merge(self, a: Array, b: Array) -> Array:
        return jax.tree.map(jnp.add, a, b)


@spec
class ExpertCounts(_PerExpert):
    """n_e, valid assignments per router expert: int64 [E]; exact below 2^31 per expert."""

    name = "expert_counts"
    dtype = jnp.int32

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        return routing.counts_E()

    def finalize(self, state: Array) -> np.ndarray:
        return np.asarray(state, np.int64)


@spec
class GateMass(_PerExpert):
    """Sum of the gate weights that each router expert received: float64 [E]."""

    name = "gate_mass"
    dtype = jnp.float32

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        return routing.gate_mass_E()

    def finalize(self, state: Array) -> np.ndarray:
        return np.asarray(state, np.float64)


@spec
class SoftCounts(_PerExpert):
    """Sum over tokens of the router's probability of each expert, chosen or not: float64 [E]."""

    name = "soft_counts"
    dtype = jnp.float32

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        return jnp.sum(jnp.where(mask_T[:, None], routing.probabilities_TxE, 0), axis=0)

    def finalize(self, state: Array) -> np.ndarray:
        return np.asarray(state, np.float64)
