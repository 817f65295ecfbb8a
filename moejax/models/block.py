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
from moejax.models.mixer import Carry, LayerState, SequenceState
from moejax.models.norm import Norm
from moejax.models.spec import DenseSpec, LayerSpec, ModelSpec
from moejax.moe import GatedFFN, MoELayer, MoESpec, Parallel, RouterContext, Routing


class Block(nnx.Module):
    """h = x + mixer(norm(x)), then h + ffn(norm(h)); a dropped part leaves its input as it is.

    With a dense residual: h + ffn(norm(h)) + moe(norm(x)).
    """

    def __init__(self, layer: LayerSpec, model: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = layer
        self.multiplier = model.residual_multiplier
        width, scale = model.width, model.init_scale
        mixer, ffn = layer.mixer, layer.ffn

        def norm(exists: bool) -> Norm | None:
            return Norm(model.norm, width) if exists else None

        self.attention_norm = norm(mixer is not None)
        self.attention = mixer.build(width, scale, rngs=rngs) if mixer is not None else None
        self.attention_post_norm = norm(mixer is not None and model.post_norm)
        self.ffn_norm = norm(ffn is not None)
        self.moe = MoELayer(ffn, width, scale, rngs=rngs) if isinstance(ffn, MoESpec) else None
        self.moe_norm = norm(layer.dense_residual is not None)
        self.ffn = _dense(layer.dense, width, scale, rngs) if layer.dense is not None else None
        self.ffn_post_norm = norm(ffn is not None and model.post_norm)

    def __call__(
        self,
        x_BxSxD: Array,
        state: SequenceState | LayerState | None,
        position_BxS: Array,
        mask_BxS: Array,
        context: RouterContext,
        request: Request,
        carry: Carry,
        parallel: Parallel | None = None,
    ) -> tuple[Array, SequenceState | LayerState | None, Routing | None, Taps, Carry]:
        """The stream after the block, its state, its routing, taps, and what it `writes`."""
        found, routing, written = taps.collect(request, block_input=x_BxSxD), None, {}
        h_BxSxD = x_BxSxD
        if self.attention is not None and self.attention_norm is not None:
            asked = request | {taps.ATTENTION_MASS} if self._rules_read_attention else request
            y_BxSxD, state, mixed, written = self.attention(
                self.attention_norm(x_BxSxD), state, position_BxS, mask_BxS, asked, carry
            )
            h_BxSxD = self._added(x_BxSxD, y_BxSxD, self.attention_post_norm)
            if self._rules_read_attention:
                context = _with_attention(context, mixed[taps.ATTENTION_MASS])
            found = found.merged(taps.collect(request, **mixed.values))
        found = found.merged(taps.collect(request, mixer_output=h_BxSxD))
        out_BxSxD = h_BxSxD
        if self.moe is not None:
            normed = self._normed(self.ffn_norm, h_BxSxD)
            if self.moe_norm is not None:
                normed = self._normed(self.moe_norm, x_BxSxD)
            y_TxD, routing, routed = self.moe(normed, context, request, parallel)
            out_BxSxD = self._added(out_BxSxD, y_TxD, self.ffn_post_norm)
            found = found.merged(routed)
            found = found.merged(taps.collect(request, ffn_input=normed, ffn_output=y_TxD))
        if self.ffn is not None:
            normed = self._normed(self.ffn_norm, h_BxSxD)
            hidden_TxF = self.ffn.hidden(normed)
            y_TxD = self.ffn.project(hidden_TxF)
            out_BxSxD = self._added(out_BxSxD, y_TxD, self.ffn_post_norm)
            found = found.merged(taps.collect(request, ffn_hidden=hidden_TxF))
            seen = {taps.DENSE_INPUT: normed}
            if self.moe is None:
                seen = {taps.FFN_INPUT: normed, taps.FFN_OUTPUT: y_TxD}
            found = found.merged(taps.collect(request, **seen))
        found = found.merged(taps.collect(request, block_output=out_BxSxD))
        return out_BxSxD, state, routing, found, written

    @property
    def _rules_read_attention(self) -> bool:
        ffn = self.spec.ffn
        reads = isinstance(ffn, MoESpec) and any(rule.uses_attention for rule in ffn.rules)
        return reads and self.attention is not None

    def _added(self, x_BxSxD: Array, y: Array, post_norm: Norm | None) -> Array:
        """x + multiplier * post_norm(y)."""
        y = y if post_norm is None else post_norm(y)
        y = y if self.multiplier == 1 else y * self.multiplier
        return x_BxSxD + y.reshape(x_BxSxD.shape)

    @staticmethod
    def _normed(norm: Norm | None, x_BxSxD: Array) -> Array:
        """x_TxD."""
        assert norm is not None
        return norm(x_BxSxD).reshape(-1, x_BxSxD.shape[-1])


def _with_attention(context: RouterContext, mass_BxS: Array) -> RouterContext:
    """The context with the attention mass of its tokens, unless a single one is decoded."""
    if mass_BxS.shape[1] == 1:
        return context
    return dataclasses.replace(context, attention_T=mass_BxS.reshape(-1))


def _dense(ffn: DenseSpec, width: int, scale: float, rngs: nnx.Rngs) -> GatedFFN:
    return GatedFFN(width, ffn.width, ffn.activation, scale, rngs=rngs)


def stack(blocks: Sequence[Block]) -> list[Block]:
    """Maximal runs of equal blocks, each one block whose leaves lead with the layer axis.

    Equal means: same spec, same formats, same shapes; a scan then compiles the run once. A block
    without parameters (all parts dropped) is a run of its own: no leaf says how many there are.
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
        if kind != previous or not jax.tree.leaves(state):
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
