"""Statistics of what routers decide: counts, masses, pairs, ratios of gates."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.calibrate.accumulators import Sums, Tokens
from moejax.core import DataError, Taps, spec, taps
from moejax.core.taps import Request
from moejax.models import LayerSpec, ModelSpec
from moejax.moe import MoESpec, Routing


class _OfRouting(Sums, abc.ABC):
    """What sums over router experts share: a state [E], int32 or float32."""

    dtype: Any = jnp.float32
    request: Request = frozenset({taps.ROUTING})

    @abc.abstractmethod
    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        """The sum over one batch alone."""

    def shape(self, ffn: MoESpec) -> tuple[int, ...]:
        return (ffn.experts,)

    def init(self, layer: LayerSpec, model: ModelSpec) -> Array | None:
        if not isinstance(layer.ffn, MoESpec):
            return None
        return jnp.zeros(self.shape(layer.ffn), self.dtype)

    def update(self, state: Array, found: Taps, tokens: Tokens) -> Array:
        return state + self.of_batch(found[taps.ROUTING], tokens.mask_T).astype(self.dtype)

    def finalize(self, state: Array) -> np.ndarray:
        wide = np.int64 if jnp.issubdtype(self.dtype, jnp.integer) else np.float64
        return np.asarray(state, wide)


@spec
class ExpertCounts(_OfRouting):
    """n_e, valid assignments per router expert: int64 [E]; exact below 2^31 per expert."""

    name = "expert_counts"
    dtype = jnp.int32

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        return routing.counts_E()


@spec
class GateMass(_OfRouting):
    """Sum of the gate weights that each router expert received, as used: float64 [E]."""

    name = "gate_mass"

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        return routing.gate_mass_E()


@spec
class ProbabilityMass(_OfRouting):
    """Sum of the router's probability of each expert where it was chosen: float64 [E].

    The gates before they are renormalised over the chosen experts (arXiv:2410.06270's w_e).
    """

    name = "probability_mass"

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        return jnp.sum(jnp.where(_chosen(routing), routing.probabilities_TxE, 0), axis=0)


@spec
class SoftCounts(_OfRouting):
    """Sum over tokens of the router's probability of each expert, chosen or not: float64 [E]."""

    name = "soft_counts"

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        return jnp.sum(jnp.where(mask_T[:, None], routing.probabilities_TxE, 0), axis=0)


@spec
class CoActivation(_OfRouting):
    """C_ij, tokens that chose both experts i and j: int64 [E, E]; C_ii are those that chose i."""

    name = "co_activation"
    dtype = jnp.int32

    def shape(self, ffn: MoESpec) -> tuple[int, ...]:
        return (ffn.experts, ffn.experts)

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        chosen_TxE = _chosen(routing).astype(jnp.float32)  # exact: products of 0 and 1
        return jnp.round(jnp.einsum("ti,tj->ij", chosen_TxE, chosen_TxE))


@spec
class LogitGram(_OfRouting):
    """Sum over tokens of l_i l_j, the router's logits of each pair of experts: float64 [E, E].

    Experts whose logits over the text point the same way are grouped by M-SMoE (arXiv:2310.01334).
    """

    name = "logit_gram"

    def shape(self, ffn: MoESpec) -> tuple[int, ...]:
        return (ffn.experts, ffn.experts)

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        logits_TxE = jnp.where(mask_T[:, None], routing.logits_TxE, 0)
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("ti,tj->ij", logits_TxE, logits_TxE, precision=exact)


@spec
class GateRatios(_OfRouting):
    """Histogram of g_(2) / g_(1), second to largest gate of a token: int64 [bins] over [0, 1].

    Of tokens with at least two experts (arXiv:2402.14800). `quantile` reads a threshold from it.
    """

    name = "gate_ratios"
    dtype = jnp.int32
    bins = 4096

    def shape(self, ffn: MoESpec) -> tuple[int, ...]:
        return (self.bins,)

    def of_batch(self, routing: Routing, mask_T: Array) -> Array:
        if routing.per_token is not None:
            gate_TxK = jnp.where(routing.valid_A, routing.gate_A, -1.0)
            gate_TxK = gate_TxK.reshape(routing.tokens, routing.per_token)
        else:
            empty_TxE = jnp.full((routing.tokens, routing.experts), -1.0)
            gate_A = jnp.where(routing.valid_A, routing.gate_A, -1.0)
            gate_TxK = empty_TxE.at[routing.token_A, routing.expert_A].max(gate_A)
        if gate_TxK.shape[1] < 2:
            return jnp.zeros(self.bins, self.dtype)
        first_T, second_T = jnp.moveaxis(jax.lax.top_k(gate_TxK, 2)[0], 1, 0)
        counts_T = (second_T >= 0) & (first_T > 0)
        ratio_T = jnp.where(counts_T, second_T / jnp.where(counts_T, first_T, 1), 0)
        bin_T = jnp.minimum((ratio_T * self.bins).astype(jnp.int32), self.bins - 1)
        return jnp.zeros(self.bins, self.dtype).at[bin_T].add(counts_T.astype(self.dtype))


def quantile(histogram: np.ndarray, q: float) -> float:
    """The value that a share q of a histogram over [0, 1] lies below, linear inside a bin.

    DataError for an empty histogram: no token had two experts.
    """
    counts = np.asarray(histogram, np.float64)
    total = counts.sum()
    if not total > 0 or not 0 <= q <= 1:
        raise DataError(
            f"the quantile {q} of {total:g} values does not exist.",
            "Ratios of gates need a router that chooses two experts; q lies from 0 to 1.",
        )
    below = np.concatenate([[0.0], np.cumsum(counts)])
    wanted = q * total
    # The first bin that reaches the wanted count, so that empty bins before it are skipped.
    index = int(np.clip(np.searchsorted(below, wanted, side="left") - 1, 0, len(counts) - 1))
    inside = (wanted - below[index]) / counts[index] if counts[index] else 0.0
    return (index + float(np.clip(inside, 0, 1))) / len(counts)


def _chosen(routing: Routing) -> Array:
    """Which token chose which router expert: bool [T, E]."""
    none_TxE = jnp.zeros((routing.tokens, routing.experts), jnp.int32)
    at = (routing.token_A, routing.expert_A)
    return none_TxE.at[at].max(routing.valid_A.astype(jnp.int32)) > 0
