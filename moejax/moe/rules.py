"""Rules on a routing: what a layer takes back of its router's choices at run time."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.core import SpecError, check_that, spec
from moejax.moe.routing import RouterContext, Routing

_ODD = np.array([0x9E3779B1, 0x85EBCA6B, 0x2C1B3C6D], np.uint32)  # multipliers of a hash


@runtime_checkable
class RoutingRule(Protocol):
    """Changes a `Routing` between router and dispatch; a frozen spec.

    Its tables are part of the model and never train; layers that differ in them alone still scan as
    one run. uses_attention: whether it reads `RouterContext.attention_T`.
    """

    @property
    def uses_attention(self) -> bool: ...

    def init(self) -> dict[str, Array]:
        """Tables at which the rule changes nothing."""
        ...

    def __call__(
        self, tables: dict[str, Array], routing: Routing, x_TxD: Array, context: RouterContext
    ) -> Routing: ...


@runtime_checkable
class Importance(Protocol):
    """How much a token matters: float32 [T], or None where the context does not say."""

    @property
    def uses_attention(self) -> bool: ...

    def __call__(self, x_TxD: Array, context: RouterContext) -> Array | None: ...


@spec
class AttentionImportance:
    """I_j = ||t_j||_1 times the mean attention that later tokens pay to j (arXiv:2410.06270).

    t_j is what the experts see. The released code sums attention over keys, which is 1 for every
    token; this is the mean over queries, as printed. It is not causal: in a whole text, what a
    token's experts are depends on the tokens after it.
    """

    uses_attention = True

    def __call__(self, x_TxD: Array, context: RouterContext) -> Array | None:
        if context.attention_T is None:
            return None
        return jnp.abs(x_TxD.astype(jnp.float32)).sum(-1) * context.attention_T


@spec
class RandomImportance:
    """A hash of token and place in its sequence: the control for any other importance."""

    seed: int = 0
    uses_attention = False

    def check(self) -> None:
        check_that(0 <= self.seed < 2**32, self, "seed", "Give 0, 1, 2, ...")

    def __call__(self, x_TxD: Array, context: RouterContext) -> Array:
        # The place counts valid tokens, so that neither batch size nor padding changes the hash.
        place_BxS = jnp.cumsum(_valid(x_TxD, context), axis=1, dtype=jnp.uint32)
        place_T = place_BxS.reshape(-1)
        ids_T = jnp.zeros_like(place_T) if context.token_ids_T is None else context.token_ids_T
        mixed_T = (place_T * _ODD[0] + ids_T.astype(jnp.uint32)) * _ODD[1] + np.uint32(self.seed)
        mixed_T = (mixed_T ^ (mixed_T >> 15)) * _ODD[2]
        return (mixed_T ^ (mixed_T >> 16)).astype(jnp.float32)


@spec
class Protection:
    """The `share` of each sequence's valid tokens, rounded up, that matter most.

    No token is protected where one is decoded at a time: there is nothing to compare it with.
    """

    share: float = 0.02
    importance: Importance = AttentionImportance()

    def check(self) -> None:
        check_that(0 < self.share <= 1, self, "share", "Give a share above 0, 0.02 is usual.")

    def __call__(self, x_TxD: Array, context: RouterContext) -> Array | None:
        """bool [T]: the protected tokens; None where importance is not known."""
        valid_BxS = _valid(x_TxD, context)
        length = valid_BxS.shape[1]
        importance_T = self.importance(x_TxD, context) if length > 1 else None
        if importance_T is None:
            return None
        score_BxS = jnp.where(valid_BxS, importance_T.reshape(valid_BxS.shape), -jnp.inf)
        # In float64 and less an epsilon: 0.07 * 100 must not round up to 8.
        wanted = np.ceil(self.share * np.arange(length + 1) - 1e-9).astype(np.int32)
        best_BxN, place_BxN = jax.lax.top_k(score_BxS, int(wanted[-1]))
        wanted_Bx1 = jnp.asarray(wanted)[valid_BxS.sum(1, keepdims=True)]
        counts_BxN = (jnp.arange(int(wanted[-1])) < wanted_Bx1) & (best_BxN > -jnp.inf)
        rows_Bx1 = jnp.arange(context.sequences)[:, None]
        protected_BxS = jnp.zeros(valid_BxS.shape, bool).at[rows_Bx1, place_BxN].set(counts_BxN)
        return protected_BxS.reshape(-1)


@spec
class SkipSmallGates:
    """Experts of rank 2 to k are skipped where their gate is below beta times the token's largest.

    The dynamic skipping of arXiv:2402.14800, of MC-MoE's ODP (arXiv:2410.06270) with `protect`,
    whose tokens keep all their experts. beta, a table of each layer, is 0 at first: nothing is
    skipped. For routings of K experts per token.
    renormalise: the gates that stay are scaled to the sum of all; the released codes of both papers
    do that, for gates whose sum is 1. False leaves them as they are.
    """

    protect: Protection | None = None
    renormalise: bool = True

    @property
    def uses_attention(self) -> bool:
        return self.protect is not None and self.protect.importance.uses_attention

    def init(self) -> dict[str, Array]:
        return {"beta": jnp.zeros((), jnp.float32)}

    def __call__(
        self, tables: dict[str, Array], routing: Routing, x_TxD: Array, context: RouterContext
    ) -> Routing:
        if routing.per_token is None:
            raise SpecError(
                "SkipSmallGates wants the same number of experts for every token.",
                "Use it with a router that chooses the top k.",
            )
        shape = (routing.tokens, routing.per_token)
        valid_TxK = routing.valid_A.reshape(shape)
        gate_TxK = jnp.where(valid_TxK, routing.gate_A.reshape(shape), 0)
        # A token always keeps the expert of its largest gate, whatever beta is.
        first_TxK = jnp.arange(shape[1]) == jnp.argmax(gate_TxK, axis=1, keepdims=True)
        small_TxK = gate_TxK < tables["beta"] * gate_TxK.max(1, keepdims=True)
        skipped_TxK = small_TxK & ~first_TxK
        protected_T = self.protect(x_TxD, context) if self.protect is not None else None
        if protected_T is not None:
            skipped_TxK &= ~protected_T[:, None]
        kept_TxK = valid_TxK & ~skipped_TxK
        if self.renormalise:
            gate_TxK = _renormalised(gate_TxK, kept_TxK)
        return dataclasses.replace(
            routing, gate_A=gate_TxK.reshape(-1), valid_A=kept_TxK.reshape(-1)
        )


def _renormalised(gate_TxK: Array, kept_TxK: Array) -> Array:
    """The gates, scaled so that those kept have the sum of all; to the bit where all are kept."""
    before_Tx1 = gate_TxK.sum(1, keepdims=True)
    after_Tx1 = jnp.where(kept_TxK, gate_TxK, 0).sum(1, keepdims=True)
    less_Tx1 = (after_Tx1 > 0) & (after_Tx1 < before_Tx1)
    return gate_TxK * jnp.where(less_Tx1, before_Tx1 / jnp.where(less_Tx1, after_Tx1, 1), 1)


def _valid(x_TxD: Array, context: RouterContext) -> Array:
    """bool [B, S]: which tokens count."""
    valid_T = jnp.ones(x_TxD.shape[0], bool) if context.mask_T is None else context.mask_T
    return valid_T.reshape(context.sequences, -1)
