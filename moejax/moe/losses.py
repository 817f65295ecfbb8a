"""Auxiliary losses of routers, each with its convention in its name.

A loss maps the routings of all layers and a token mask to one scalar, its weight included. With
f_i the share of tokens whose choices include expert i, and P_i the mean probability of i:

| loss | per layer | balanced value, weight 1 |
| SwitchLoadBalance | E sum_i f_i P_i, f_i of the first choice only (arXiv:2101.03961, eq. 4) | 1 |
| TopKLoadBalance | E sum_i f_i P_i, f_i of all k choices, each layer by itself | k |
| PooledLoadBalance | the same over the tokens of all layers together (transformers' Mixtral) | k |
| BiLevelLoadBalance | the Switch loss over nodes, and over their places (arXiv:2212.05191) | 2 |
| RouterZLoss | mean logsumexp(l)^2 (arXiv:2202.08906, eq. 5) | - |
| GateEntropy | mean entropy of p (arXiv:2404.05089): not balanced but peaked | log E |

Per-layer losses are summed over layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core import check_that, spec
from moejax.moe.routing import Routing


@runtime_checkable
class RouterLoss(Protocol):
    """(routing of every MoE layer, mask_T or None) -> float32 scalar, weight included."""

    def __call__(self, routings: Sequence[Routing], mask_T: Array | None) -> Array: ...


@spec
class TopKLoadBalance:
    """E sum_i f_i P_i with f_i over all choices, layer by layer, summed."""

    weight: float = 0.01

    def __call__(self, routings: Sequence[Routing], mask_T: Array | None) -> Array:
        return self.weight * _total(_balance(*_shares(r, mask_T)) for r in routings)


@spec
class SwitchLoadBalance:
    """E sum_i f_i P_i with f_i over the expert of highest probability, layer by layer, summed."""

    weight: float = 0.01

    def __call__(self, routings: Sequence[Routing], mask_T: Array | None) -> Array:
        return self.weight * _total(_balance(*_first_shares(r, mask_T)) for r in routings)


@spec
class PooledLoadBalance:
    """E sum_i f_i P_i over the tokens of all layers pooled (transformers' Mixtral)."""

    weight: float = 0.001

    def __call__(self, routings: Sequence[Routing], mask_T: Array | None) -> Array:
        shares = [_shares(r, mask_T) for r in routings]
        share_E = _total(share for share, _ in shares) / len(shares)
        mean_E = _total(mean for _, mean in shares) / len(shares)
        return self.weight * _balance(share_E, mean_E)


@spec
class BiLevelLoadBalance:
    """weight n sum_i f_i P_i + device_weight m sum_j f_j Q_j, layer by layer, summed.

    For `BiLevelScores` of n nodes with m experts each (arXiv:2212.05191): P and Q are the mean
    probabilities of a node and of a place within it, f the shares of first choices.
    """

    nodes: int
    weight: float = 0.01
    device_weight: float = 0.01

    def check(self) -> None:
        check_that(self.nodes >= 1, self, "nodes", "Give the nodes of BiLevelScores.")

    def __call__(self, routings: Sequence[Routing], mask_T: Array | None) -> Array:
        return _total(self._of_layer(*_first_shares(r, mask_T)) for r in routings)

    def _of_layer(self, share_E: Array, mean_E: Array) -> Array:
        share_IxJ, mean_IxJ = share_E.reshape(self.nodes, -1), mean_E.reshape(self.nodes, -1)
        nodes = _balance(share_IxJ.sum(1), mean_IxJ.sum(1))
        places = _balance(share_IxJ.sum(0), mean_IxJ.sum(0))
        return self.weight * nodes + self.device_weight * places


@spec
class RouterZLoss:
    """mean_t logsumexp(l_t)^2, layer by layer, summed."""

    weight: float = 0.001

    def __call__(self, routings: Sequence[Routing], mask_T: Array | None) -> Array:
        squares = [jnp.square(jax.nn.logsumexp(r.logits_TxE, axis=-1)) for r in routings]
        return self.weight * _total(_mean(s, mask_T) for s in squares)


@spec
class GateEntropy:
    """mean_t H(p_t) in nats, layer by layer, summed: it makes the router sure (arXiv:2404.05089).

    p is what the router selects by, over its sum where that is not one (sigmoid gates).
    """

    weight: float = 0.01

    def __call__(self, routings: Sequence[Routing], mask_T: Array | None) -> Array:
        return self.weight * _total(_mean(_entropy(r), mask_T) for r in routings)


def _entropy(routing: Routing) -> Array:
    """[T], with a finite gradient where a probability is zero."""
    p_TxE = routing.probabilities_TxE
    p_TxE = p_TxE / jnp.sum(p_TxE, axis=-1, keepdims=True)
    some_TxE = p_TxE > 0
    log_TxE = jnp.log(jnp.where(some_TxE, p_TxE, 1.0))
    return -jnp.sum(p_TxE * log_TxE, axis=-1)


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def _balance(share_E: Array, mean_E: Array) -> Array:
    return share_E.size * jnp.sum(share_E * mean_E)


def _shares(routing: Routing, mask_T: Array | None) -> tuple[Array, Array]:
    """f_i, choices of expert i per token, and P_i."""
    tokens = routing.tokens if mask_T is None else jnp.maximum(jnp.sum(mask_T), 1)
    share_E = jax.lax.stop_gradient(routing.counts_E()) / tokens
    return share_E, _mean_probability(routing, mask_T)


def _first_shares(routing: Routing, mask_T: Array | None) -> tuple[Array, Array]:
    first_TxE = jax.nn.one_hot(jnp.argmax(routing.probabilities_TxE, axis=-1), routing.experts)
    return _mean(first_TxE, mask_T), _mean_probability(routing, mask_T)


def _mean_probability(routing: Routing, mask_T: Array | None) -> Array:
    p_TxE = routing.probabilities_TxE
    return _mean(p_TxE / jnp.sum(p_TxE, axis=-1, keepdims=True), mask_T)


def _mean(values_Tx: Array, mask_T: Array | None) -> Array:
    if mask_T is None:
        return jnp.mean(values_Tx, axis=0)
    weight = mask_T.reshape((-1,) + (1,) * (values_Tx.ndim - 1)).astype(values_Tx.dtype)
    return jnp.sum(values_Tx * weight, axis=0) / jnp.maximum(jnp.sum(weight), 1)
