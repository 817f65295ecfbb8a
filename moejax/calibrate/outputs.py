"""Statistics of what experts and blocks put out: means, norms, cosines, attention."""

from __future__ import annotations

import abc
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.calibrate.accumulators import Sums, Tokens, mean
from moejax.core import Taps, check_that, spec, taps
from moejax.core.taps import Request
from moejax.models import LayerSpec, ModelSpec
from moejax.moe import MoESpec


@spec
class MeanOutputs(Sums):
    """Mean over all valid tokens of E_e(x), each stored expert on every token: float64 [E, D].

    What HC-SMoE groups experts by (arXiv:2410.08589).
    """

    name = "mean_outputs"
    request = frozenset({taps.ALL_OUTPUT})

    def init(self, layer: LayerSpec, model: ModelSpec) -> Any:
        if not isinstance(layer.ffn, MoESpec):
            return None
        sums_ExD = jnp.zeros((layer.ffn.stored, model.width), jnp.float32)
        return sums_ExD, jnp.zeros((), jnp.int32)

    def update(self, state: Any, found: Taps, tokens: Tokens) -> Any:
        y_ExTxD = found[taps.ALL_OUTPUT].astype(jnp.float32)
        seen = jnp.where(tokens.mask_T[:, None], y_ExTxD, 0).sum(axis=1)
        return self.merge(state, (seen, jnp.sum(tokens.mask_T, dtype=jnp.int32)))

    def finalize(self, state: Any) -> np.ndarray:
        return mean(*state)


@spec
class OutputNorms(Sums):
    """Per stored expert, sum over its rows of |E_e(x)| and of gate |E_e(x)|: float64 [2, E]."""

    name = "output_norms"
    request = frozenset({taps.EXPERT_OUTPUT, taps.DISPATCH})

    def init(self, layer: LayerSpec, model: ModelSpec) -> Array | None:
        if not isinstance(layer.ffn, MoESpec):
            return None
        return jnp.zeros((2, layer.ffn.stored), jnp.float32)

    def update(self, state: Array, found: Taps, tokens: Tokens) -> Array:
        plan, y_RxD = found[taps.DISPATCH], found[taps.EXPERT_OUTPUT].astype(jnp.float32)
        ends_E = jnp.cumsum(plan.group_sizes_E)
        expert_R = jnp.searchsorted(ends_E, jnp.arange(y_RxD.shape[0]), side="right")
        norm_R = jnp.where(plan.valid_R, jnp.linalg.norm(y_RxD, axis=1), 0)
        both_2xR = jnp.stack([norm_R, norm_R * plan.gate_R])
        return state.at[:, expert_R].add(both_2xR, mode="drop")  # rows beyond the groups

    def finalize(self, state: Array) -> np.ndarray:
        return np.asarray(state, np.float64)


@spec
class NeuronNorms(Sums):
    """Per stored expert and neuron j, sum over its rows of (z_j / ||z||_2)^2: float64 [E, F].

    z: the hidden activation, what the down projection sees; [1, F] of a dense feed-forward. The
    root of it is the statistic of GRIFFIN (arXiv:2404.01365).
    """

    name = "neuron_norms"
    request = frozenset({taps.EXPERT_HIDDEN, taps.DISPATCH, taps.FFN_HIDDEN})

    def init(self, layer: LayerSpec, model: ModelSpec) -> Array | None:
        if layer.ffn is None:
            return None
        experts = layer.ffn.stored if isinstance(layer.ffn, MoESpec) else 1
        return jnp.zeros((experts, layer.ffn.width), jnp.float32)

    def update(self, state: Array, found: Taps, tokens: Tokens) -> Array:
        if taps.DISPATCH not in found:
            return state + _shares(found[taps.FFN_HIDDEN], tokens.mask_T).sum(0)
        plan, hidden_RxF = found[taps.DISPATCH], found[taps.EXPERT_HIDDEN]
        ends_E = jnp.cumsum(plan.group_sizes_E)
        expert_R = jnp.searchsorted(ends_E, jnp.arange(hidden_RxF.shape[0]), side="right")
        return state.at[expert_R].add(_shares(hidden_RxF, plan.valid_R), mode="drop")

    def finalize(self, state: Array) -> np.ndarray:
        return np.asarray(state, np.float64)


def _shares(z_RxF: Array, counts_R: Array) -> Array:
    """(z_j / ||z||)^2 of the rows that count, 0 of the others and of rows that are zero."""
    square_RxF = jnp.square(z_RxF.astype(jnp.float32))
    total_Rx1 = square_RxF.sum(-1, keepdims=True)
    share_RxF = square_RxF / jnp.where(total_Rx1 > 0, total_Rx1, 1)
    return jnp.where(counts_R[:, None], share_RxF, 0)


class _MeanOverTokens(Sums, abc.ABC):
    """What means of one number per token share: a state of its sum and the count."""

    def init(self, layer: LayerSpec, model: ModelSpec) -> Any:
        if not self.applies(layer):
            return None
        return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)

    def applies(self, layer: LayerSpec) -> bool:
        return True

    @abc.abstractmethod
    def of_tokens(self, found: Taps) -> Array:
        """[..., T] of one batch."""

    def update(self, state: Any, found: Taps, tokens: Tokens) -> Any:
        value_T = jnp.where(tokens.mask_T, self.of_tokens(found).reshape(-1), 0)
        return self.merge(state, (value_T.sum(), jnp.sum(tokens.mask_T, dtype=jnp.int32)))

    def finalize(self, state: Any) -> np.ndarray:
        return np.asarray(mean(*state))


@spec
class BlockCosine(_MeanOverTokens):
    """Mean cosine of the residual stream before and after a block: float64 scalar.

    Near 1 where the block changes little (arXiv:2406.02500, arXiv:2403.03853).
    """

    name = "block_cosine"
    request = frozenset({taps.BLOCK_INPUT, taps.BLOCK_OUTPUT})

    def of_tokens(self, found: Taps) -> Array:
        return _cosine(found[taps.BLOCK_INPUT], found[taps.BLOCK_OUTPUT])


@spec
class StreamCosine(_MeanOverTokens):
    """Mean cosine of the residual stream at two places of a block: float64 scalar.

    before, after: "block_input", "mixer_output" or "block_output". From "mixer_output" to
    "block_output" it is what the feed-forward leaves of the stream, with its norm and the residual
    (layer drop, arXiv:2406.02500); from "block_input" to "mixer_output" what attention leaves.
    """

    before: str = taps.BLOCK_INPUT
    after: str = taps.BLOCK_OUTPUT

    def check(self) -> None:
        places = (taps.BLOCK_INPUT, taps.MIXER_OUTPUT, taps.BLOCK_OUTPUT)
        for field in ("before", "after"):
            known = getattr(self, field) in places
            check_that(known, self, field, f"Choose one of {', '.join(places)}.")

    @property
    def name(self) -> str:
        return f"stream_cosine({self.before}, {self.after})"

    @property
    def request(self) -> Request:
        return frozenset({self.before, self.after})

    def of_tokens(self, found: Taps) -> Array:
        return _cosine(found[self.before], found[self.after])


@spec
class FFNCosine(_MeanOverTokens):
    """Mean cosine of the feed-forward's normed input and its output: float64 scalar."""

    name = "ffn_cosine"
    request = frozenset({taps.FFN_INPUT, taps.FFN_OUTPUT})

    def applies(self, layer: LayerSpec) -> bool:
        return layer.ffn is not None

    def of_tokens(self, found: Taps) -> Array:
        return _cosine(found[taps.FFN_INPUT], found[taps.FFN_OUTPUT])


@spec
class AttentionMass(_MeanOverTokens):
    """Mean over tokens of the attention that later tokens pay to each: float64 scalar."""

    name = "attention_mass"
    request = frozenset({taps.ATTENTION_MASS})

    def applies(self, layer: LayerSpec) -> bool:
        return layer.mixer is not None

    def of_tokens(self, found: Taps) -> Array:
        return found[taps.ATTENTION_MASS]


def _cosine(a: Array, b: Array) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
