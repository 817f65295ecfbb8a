"""What a router decides, what it may look at, and where experts lie."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

ROUTING = "moe_routing"  # a name for policies of jax.checkpoint: who goes where
STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """A list of A assignments of tokens to experts; A is static, `valid_A` says which count.

    token_A, expert_A: int32 [A]; gate_A: float32 [A]; valid_A: bool [A] (False for padding and for
    choices that a rule took back). logits_TxE, probabilities_TxE: float32, of all router experts.
    state: what a stateful router wants to remember, name -> array; the training step puts it back.
    per_token: K where the list is a [T, K] array reshaped, so that sums over a token's experts need
    no scatter; None for any other list (expert choice, top-p).
    """

    token_A: Array
    expert_A: Array
    gate_A: Array
    valid_A: Array
    logits_TxE: Array
    probabilities_TxE: Array
    state: dict[str, Array] | None = None
    per_token: int | None = dataclasses.field(default=None, metadata=STATIC)

    @property
    def tokens(self) -> int:
        return self.logits_TxE.shape[-2]

    @property
    def experts(self) -> int:
        return self.logits_TxE.shape[-1]

    def counts_E(self) -> Array:
        """Valid assignments per router expert: float32 [E]."""
        chosen_AxE = jax.nn.one_hot(self.expert_A, self.experts, dtype=jnp.float32)
        return jnp.sum(chosen_AxE * self.valid_A[:, None], axis=0)

    def gate_mass_E(self) -> Array:
        """Sum of the gate weights each router expert received: float32 [E]."""
        chosen_AxE = jax.nn.one_hot(self.expert_A, self.experts, dtype=jnp.float32)
        return jnp.sum(chosen_AxE * jnp.where(self.valid_A, self.gate_A, 0.0)[:, None], axis=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterContext:
    """What a router may look at besides the token itself; every field may be absent.

    mask_T: False marks padding, which is routed nowhere. token_ids_T: vocabulary ids, for hash
    routing. key: random key of this step and layer. attention_T: float32, the mean attention that
    later tokens pay to each token, where a rule asks for it and tokens come as whole texts.
    train: the phase. sequences: B; the T tokens are B sequences of equal length, one by one.
    """

    mask_T: Array | None = None
    token_ids_T: Array | None = None
    key: Array | None = None
    attention_T: Array | None = None
    train: bool = dataclasses.field(default=False, metadata=STATIC)
    sequences: int = dataclasses.field(default=1, metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotMap:
    """Router expert -> stored expert: merged experts share a slot, replicated experts have several.

    slot_ExM: int32, the stored experts that serve router expert e; copies_E: int32, how many of
    the M columns count. Tokens spread over copies by their index. Applied before the sort.
    """

    slot_ExM: Array
    copies_E: Array

    def __call__(self, expert_A: Array, token_A: Array) -> Array:
        """Stored expert of every assignment: int32 [A]."""
        return self.slot_ExM[expert_A, token_A % self.copies_E[expert_A]]
