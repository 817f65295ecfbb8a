"""A block: mixer and feed-forward with their norms; equal blocks stack into scanned runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.core import Taps, taps
from moejax.core.taps import Request
from moejax.models.attention import Attention, KVState
from moejax.models.norm import RMSNorm
from moejax.models.spec import DenseSpec, LayerSpec, ModelSpec
from moejax.moe import GatedFFN, MoELayer, MoESpec, RouterContext, Routing


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); a dropped part leaves x as it is."""

    def __init__(self, layer: LayerSpec, model: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = layer
        width, scale, epsilon = model.width, model.init_scale, model.norm_epsilon
        mixer, ffn = layer.mixer, layer.ffn
        mixes = mixer is not None
        self.attention_norm = RMSNorm(width, epsilon) if mixes else None
        self.attention = Attention(mixer, width, scale, epsilon, rngs=rngs) if mixes else None
        self.ffn_norm = RMSNorm(width, epsilon) if ffn is not None else None
        self.moe = MoELayer(ffn, width, scale, rngs=rngs) if isinstance(ffn, MoESpec) else None
        self.ffn = _dense(ffn, width, scale, rngs) if isinstance(ffn, DenseSpec) else None

    def __call__(
        self,
        x_BxSxD: Array,
        state: KVState | None,
        position_BxS: Array,
        mask_BxS: Array,
        context: RouterContext,
        request: Request,
    ) -> tuple[Array, KVState | None, Routing | None, Taps]:
        found, routing = taps.collect(request, block_input=x_BxSxD), None
        if self.attention is not None and self.attention_norm is not None:
            normed = self.attention_norm(x_BxSxD)
            asked = request | {taps.ATTENTION_MASS} if self._rules_read_attention else request
            first = None if state is None else state.used
            y_BxSxD, state, mixed = self.attention(normed, state, position_BxS, mask_BxS, asked)
            x_BxSxD = x_BxSxD + y_BxSxD
            if self._rules_read_attention:
                context = _with_attention(context, mixed[taps.ATTENTION_MASS], first, mask_BxS)
            found = found.merged(taps.collect(request, **mixed.values))
        if self.ffn_norm is not None:
            x_TxD = self.ffn_norm(x_BxSxD).reshape(-1, x_BxSxD.shape[-1])
            if self.moe is not None:
                y_TxD, routing, routed = self.moe(x_TxD, context, request)
                found = found.merged(routed)
            else:
                assert self.ffn is not None
                hidden_TxF = self.ffn.hidden(x_TxD)
                y_TxD = self.ffn.project(hidden_TxF)
                found = found.merged(taps.collect(request, ffn_hidden=hidden_TxF))
            found = found.merged(taps.collect(request, ffn_input=x_TxD, ffn_output=y_TxD))
            x_BxSxD = x_BxSxD + y_TxD.reshape(x_BxSxD.shape)
        return x_BxSxD, state, routing, found.merged(taps.collect(request, block_output=x_BxSxD))

    @property
    def _rules_read_attention(self) -> bool:
        ffn = self.spec.ffn
        return isinstance(ffn, MoESpec) and any(rule.uses_attention for rule in ffn.rules)


def _with_attention(
    context: RouterContext, mass_BxS: Array, first: Array | None, mask_BxS: Array
) -> RouterContext:
    """The context with the attention mass of its tokens, unless a single one is decoded.

    first: where they lie in a cache, None without one.
    """
    if mask_BxS.shape[1] == 1:
        return context
    if first is not None:
        mass_BxS = jax.lax.dynamic_slice_in_dim(mass_BxS, first, mask_BxS.shape[1], axis=1)
    return dataclasses.replace(context, attention_T=mass_BxS.reshape(-1))


def _dense(ffn: DenseSpec, width: int, scale: float, rngs: nnx.Rngs) -> GatedFFN:
    return GatedFFN(width, ffn.width, ffn.activation, scale, rngs=rngs)


def stack(blocks: Sequence[Block]) -> list[Block]:
    """Maximal runs of equal blocks, each one block whose leaves lead with the layer axis.

    Equal means: same spec, same formats, same shapes; a scan then compiles the run once.
    """
    runs: list[list[Any]] = []
    previous = None
    for block in blocks:
        graphdef, state = nnx.split(block)
        kind = (
            block.spec,
            jax.tree.structure(state),
            [(a.shape, a.dtype) for a in jax.tree.leaves(state)],
        )
        if kind != previous:
            runs.append([graphdef])
        runs[-1].append(state)
        previous = kind
    return [nnx.merge(graphdef, jax.tree.map(_stack, *states)) for graphdef, *states in runs]


def unstack(run: Block) -> list[Block]:
    """The blocks of a run, first to last."""
    graphdef, state = nnx.split(run)
    return [
        nnx.merge(graphdef, jax.tree.map(lambda a, i=i: _index(a, i), state))
        for i in range(run_length(run))
    ]


def run_length(run: Block) -> int:
    """How many layers a run holds; a run without parameters (all parts dropped) holds one."""
    leaves = jax.tree.leaves(nnx.split(run)[1])
    return leaves[0].shape[0] if leaves else 1


def _stack(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def _index(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[i]
