"""Taps: intermediates that a caller asks a model to return; no hooks, no globals.

A request is a frozenset of the names below, static under jit. A layer answers with the values it
has; the model returns one `Taps` per layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

FFN_INPUT = "ffn_input"  # x_TxD, after the norm, what router and experts see
FFN_OUTPUT = "ffn_output"  # y_TxD, before the residual is added
ROUTING = "routing"  # moe.Routing with its logits and probabilities
EXPERT_INPUT = "expert_input"  # rows_RxD, in the order of group_sizes
EXPERT_HIDDEN = "expert_hidden"  # rows_RxF, what the down projection sees
EXPERT_OUTPUT = "expert_output"  # rows_RxD, before the gate weights
DISPATCH = "dispatch"  # the moe.DispatchPlan that gives the rows' tokens and group sizes
DROPPED = "dropped"  # int32 [], valid assignments for which no row was left
FFN_HIDDEN = "ffn_hidden"  # h_TxF of a dense feed-forward, what its down projection sees
SHARED_HIDDEN = "shared_hidden"  # h_TxF of the shared experts
ALL_HIDDEN = "all_hidden"  # [E, T, F], every stored expert on every token
ALL_OUTPUT = "all_output"  # [E, T, D], the same, before the gate weights
BLOCK_INPUT = "block_input"  # x_BxSxD, the residual stream before the block
MIXER_OUTPUT = "mixer_output"  # x_BxSxD, the residual stream behind the mixer, where one is
BLOCK_OUTPUT = "block_output"  # x_BxSxD, the residual stream after it
ATTENTION_INPUT = "attention_input"  # x_BxSxD, after the norm
ATTENTION_CONTEXT = "attention_context"  # [B, S, H W], what the output projection sees
FILTERED_INPUT = "filtered_input"  # x_BxSxD behind a local filter, what queries and keys see
DENSE_INPUT = "dense_input"  # x_TxD, what a dense feed-forward beside the routed one sees
QUERY_LATENT = "query_latent"  # [B, S, Q], what the up projection of queries sees (MLA)
KV_LATENT = "kv_latent"  # [B, S, R], what the up projection of keys and values sees (MLA)
ATTENTION_MASS = (
    "attention_mass"  # [B, S], attention that later tokens pay to each token, mean over heads
)

NAMES = frozenset(
    {
        FFN_INPUT,
        FFN_OUTPUT,
        ROUTING,
        EXPERT_INPUT,
        EXPERT_HIDDEN,
        EXPERT_OUTPUT,
        DISPATCH,
        DROPPED,
        FFN_HIDDEN,
        SHARED_HIDDEN,
        ALL_HIDDEN,
        ALL_OUTPUT,
        BLOCK_INPUT,
        MIXER_OUTPUT,
        BLOCK_OUTPUT,
        ATTENTION_INPUT,
        ATTENTION_CONTEXT,
        FILTERED_INPUT,
        DENSE_INPUT,
        QUERY_LATENT,
        KV_LATENT,
        ATTENTION_MASS,
    }
)
Request = frozenset[str]
NOTHING: Request = frozenset()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taps:
    """What one layer returned of a request: name -> array or pytree."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def merged(self, other: Taps) -> Taps:
        return Taps({**self.values, **other.values})


def collect(request: Request, **values: Any) -> Taps:
    """The asked-for part of `values`."""
    return Taps({name: value for name, value in values.items() if name in request})
