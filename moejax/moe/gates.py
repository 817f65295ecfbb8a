"""Gates: what probabilities are, and how much each chosen expert counts."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core import check_that, spec


@runtime_checkable
class Gates(Protocol):
    """Gate weights: `probabilities` for selection and losses, `weigh` for the chosen experts.

    `weigh` sees the logits of all experts and which were chosen, in order of choice: what a gate
    over a masked or shrinking set of experts needs, and where an estimator of the routing gradient
    is a custom derivative.
    """

    def probabilities(self, logits_TxE: Array) -> Array: ...

    def weigh(self, logits_TxE: Array, probabilities_TxE: Array, expert_TxK: Array) -> Array:
        """gate_TxK of the chosen experts."""
        ...


@spec
class SoftmaxGates:
    """p = softmax(l); g = scale * p of the chosen, divided by their sum if `renormalise`."""

    renormalise: bool = False
    scale: float = 1.0

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.softmax(logits_TxE, axis=-1)

    def weigh(self, logits_TxE: Array, probabilities_TxE: Array, expert_TxK: Array) -> Array:
        p_TxK = _chosen(probabilities_TxE, expert_TxK)
        total = jnp.sum(p_TxK, axis=-1, keepdims=True) if self.renormalise else 1.0
        return self.scale * p_TxK / total


@spec
class PNormGates:
    """p = softmax(l); g = p of the chosen, over their L_order norm (DBRX; order 1: the sum)."""

    order: float = 1.0

    def check(self) -> None:
        check_that(self.order >= 1, self, "order", "DBRX has 1.")

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.softmax(logits_TxE, axis=-1)

    def weigh(self, logits_TxE: Array, probabilities_TxE: Array, expert_TxK: Array) -> Array:
        p_TxK = _chosen(probabilities_TxE, expert_TxK)
        # The largest is taken out, so that no power underflows.
        unit_TxK = p_TxK / jnp.max(p_TxK, axis=-1, keepdims=True)
        norm_Tx1 = jnp.sum(unit_TxK**self.order, axis=-1, keepdims=True) ** (1 / self.order)
        return unit_TxK / norm_Tx1


@spec
class ChosenSoftmaxGates:
    """g = scale * softmax over the logits of the chosen experts alone.

    scale: LLaMA-MoE's score_scale_factor (arXiv:2406.16554).
    """

    scale: float = 1.0

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.softmax(logits_TxE, axis=-1)

    def weigh(self, logits_TxE: Array, probabilities_TxE: Array, expert_TxK: Array) -> Array:
        return self.scale * jax.nn.softmax(_chosen(logits_TxE, expert_TxK), axis=-1)


@spec
class SigmoidGates:
    """s = sigmoid(l); g = scale * s of the chosen, divided by their sum if `renormalise`.

    arXiv:2412.19437, equations 12 to 16; 1e-20 beside the sum as in transformers.
    """

    renormalise: bool = True
    scale: float = 1.0

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.sigmoid(logits_TxE)

    def weigh(self, logits_TxE: Array, probabilities_TxE: Array, expert_TxK: Array) -> Array:
        s_TxK = _chosen(probabilities_TxE, expert_TxK)
        total = jnp.sum(s_TxK, axis=-1, keepdims=True) + 1e-20 if self.renormalise else 1.0
        return self.scale * s_TxK / total


@spec
class SparseMixerGates:
    """Each chosen expert's share among those that come close to the best one left.

    SparseMixer-v2 (arXiv:2409.12136) as Phi-3.5-MoE and GRIN-MoE evaluate it, after `TopK`. For
    the choices in turn: m is the largest logit l_i of the experts not yet chosen; of these, the
    ones with (m - l_i) / max(|l_i|, m) > 2 jitter are left out; g is the softmax over the rest at
    the chosen one. The gates of a token are not normalised together, and each is near 1 where its
    expert is far ahead. This is the rule of both phases: the draws of training and their gradient
    estimate are not in it.
    """

    jitter: float = 0.01

    def check(self) -> None:
        check_that(self.jitter >= 0, self, "jitter", "Phi-3.5-MoE has 0.01.")

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.softmax(logits_TxE, axis=-1)

    def weigh(self, logits_TxE: Array, probabilities_TxE: Array, expert_TxK: Array) -> Array:
        left_TxE = logits_TxE
        gates = []
        for chosen_T in expert_TxK.T:
            best_Tx1 = jnp.max(left_TxE, axis=-1, keepdims=True)
            behind_TxE = (best_Tx1 - left_TxE) / jnp.maximum(jnp.abs(logits_TxE), best_Tx1)
            near_TxE = jnp.where(behind_TxE > 2 * self.jitter, -jnp.inf, left_TxE)
            share_TxE = jax.nn.softmax(near_TxE, axis=-1)
            gates.append(_chosen(share_TxE, chosen_T[:, None]))
            here_TxE = jnp.arange(logits_TxE.shape[-1]) == chosen_T[:, None]
            left_TxE = jnp.where(here_TxE, -jnp.inf, left_TxE)
        return jnp.concatenate(gates, axis=-1)


@spec
class UnitGates:
    """g = 1 for every chosen expert: a layer adds its experts up (arXiv:2110.01786).

    p = softmax(l) serves selection and losses; through g no gradient reaches the router.
    """

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.softmax(logits_TxE, axis=-1)

    def weigh(self, logits_TxE: Array, probabilities_TxE: Array, expert_TxK: Array) -> Array:
        return jnp.ones(expert_TxK.shape, logits_TxE.dtype)


def _chosen(values_TxE: Array, expert_TxK: Array) -> Array:
    return jnp.take_along_axis(values_TxE, expert_TxK, axis=-1)
