"""The decoder language model: a thin holder of parameters and a pure forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import Taps, compat, keys, parts
from moejax.core.taps import NOTHING, Request
from moejax.mesh import batch_sharding
from moejax.models.block import Block, run_length, stack, unstack
from moejax.models.logical import between_uses
from moejax.models.mixer import Carry, LayerState
from moejax.models.norm import Norm
from moejax.models.remat import Remat
from moejax.models.spec import ModelSpec
from moejax.moe import Parallel, RouterContext, Routing, draw

State = tuple[Any, ...]


class DecoderLM(nnx.Module):
    """Embedding, blocks in scanned runs, final norm, head (the embedding transposed if tied)."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.embed = nnx.Param(draw(rngs, (spec.vocab, spec.width), spec.init_scale))
        self.runs = nnx.List(stack([Block(layer, spec, rngs=rngs) for layer in spec.layers]))
        self.final_norm = Norm(spec.norm, spec.width)
        self.head = (
            None
            if spec.tie_embeddings
            else nnx.Param(draw(rngs, (spec.width, spec.vocab), spec.init_scale))
        )
        bias = jnp.zeros(spec.vocab, jnp.float32)
        self.head_bias = nnx.Param(bias) if spec.head_bias else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoding:
    """hidden_BxSxD: after the final norm. routings, taps: one per layer, None or empty where a
    layer has none. state: the sequence state after these tokens, None if none was given."""

    hidden_BxSxD: Array
    routings: tuple[Routing | None, ...]
    taps: tuple[Taps, ...]
    state: State | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output(Encoding):
    """An encoding and its next-token logits_BxSxV, float32."""

    logits_BxSxV: Array


def forward(model: DecoderLM, tokens_BxS: Array, **how: Any) -> Output:
    """Next-token logits: `encode` (whose arguments it takes), then `project`."""
    encoding = encode(model, tokens_BxS, **how)
    logits_BxSxV = project(model, encoding.hidden_BxSxD)
    same = {f.name: getattr(encoding, f.name) for f in dataclasses.fields(encoding)}
    return Output(**same, logits_BxSxV=logits_BxSxV)


@jax.named_scope(parts.HEAD)
def project(model: DecoderLM, hidden: Array) -> Array:
    """Logits [..., V] in float32 of hidden states [..., D]; a loss may call it chunk by chunk."""
    if model.head is None:
        table_VxD = weights.materialize(compat.read(model.embed), hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, table_VxD, preferred_element_type=jnp.float32)
    else:
        logits = weights.matmul(hidden.astype(jnp.float32), compat.read(model.head))
    logits, spec = logits.astype(jnp.float32), model.spec
    if model.head_bias is not None:
        logits = logits + compat.read(model.head_bias).astype(jnp.float32)
    if spec.logits_multiplier != 1:
        logits = logits * spec.logits_multiplier
    if spec.logits_soft_cap is not None:
        logits = spec.logits_soft_cap * jnp.tanh(logits / spec.logits_soft_cap)
    return logits


def encode(
    model: DecoderLM,
    tokens_BxS: Array,
    *,
    mask_BxS: Array | None = None,
    positions_BxS: Array | None = None,
    state: State | None = None,
    train: bool = False,
    key: Array | None = None,
    request: Request = NOTHING,
    dtype: Any = jnp.float32,
    parallel: Parallel | None = None,
    remat: Remat | None = None,
) -> Encoding:
    """Hidden states of a text; pure, to be called inside jit on a merged model.

    tokens_BxS: int32. mask_BxS: False marks padding: nothing attends to it, no expert sees it.
    positions_BxS: default 0, 1, ... per row. state: from `init_state`, for decoding.
    key: of this step; layers fold in their index. dtype: of activations; weights are cast to it
    where they are used; routers, norms, softmax and logits stay in float32. parallel: the mesh on
    which `place` has put the model, and the strategy of its routed layers; None for one device.
    remat: what a backward pass computes again, None for nothing.
    """
    mask_BxS = jnp.ones(tokens_BxS.shape, bool) if mask_BxS is None else mask_BxS
    if positions_BxS is None:
        positions_BxS = _positions(tokens_BxS)
    x_BxSxD = lookup(model.spec, compat.read(model.embed), tokens_BxS, dtype)
    context = _context(tokens_BxS, mask_BxS, train)
    routings: list[Routing | None] = []
    found: list[Taps] = []
    states: list[Any] = []
    carry: Carry = {}
    for index, run in enumerate(model.runs):
        length = run_length(run)
        first = len(routings)
        layer_keys = None if key is None else keys.fold_each(key, jnp.arange(first, first + length))
        x_BxSxD, after, routed, tapped, written = _scan(
            run,
            x_BxSxD,
            None if state is None else state[index],
            (positions_BxS, mask_BxS, context, request, carry, parallel),
            layer_keys,
            remat,
        )
        carry = {**carry, **written}
        states.append(after)
        routings += _by_layer(routed, length)
        found += _by_layer(tapped, length)
    return Encoding(
        hidden_BxSxD=model.final_norm(x_BxSxD),
        routings=tuple(routings),
        taps=tuple(found),
        state=None if state is None else tuple(states),
    )


def lookup(spec: ModelSpec, table_VxD: Any, tokens_BxS: Array, dtype: Any = jnp.float32) -> Array:
    """x_BxSxD, what the first block of a model sees; table_VxD: its `embed`, in any format."""
    x_BxSxD = weights.materialize(table_VxD, dtype)[tokens_BxS]
    return x_BxSxD if spec.embedding_multiplier == 1 else x_BxSxD * spec.embedding_multiplier


def run_block(
    block: Block,
    x_BxSxD: Array,
    tokens_BxS: Array,
    mask_BxS: Array,
    request: Request,
    carry: Carry,
) -> tuple[Array, Taps, Carry]:
    """One block on whole texts, as `encode` runs it: the next block's input, taps, and carry."""
    context = _context(tokens_BxS, mask_BxS, train=False)
    x_BxSxD, _, _, found, written = block(
        x_BxSxD, None, _positions(tokens_BxS), mask_BxS, context, request, carry
    )
    return x_BxSxD, found, {**carry, **written}


def _positions(tokens_BxS: Array) -> Array:
    B, S = tokens_BxS.shape
    return jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))


def _context(tokens_BxS: Array, mask_BxS: Array, train: bool) -> RouterContext:
    return RouterContext(
        mask_T=mask_BxS.reshape(-1),
        token_ids_T=tokens_BxS.reshape(-1),
        train=train,
        sequences=tokens_BxS.shape[0],
    )


def _scan(
    run: Block,
    x: Array,
    state: Any,
    fixed: tuple,
    layer_keys: Array | None,
    remat: Remat | None,
) -> tuple[Array, Any, Any, Taps, Carry]:
    graphdef, stacked = nnx.split(run)
    positions_BxS, mask_BxS, context, request, carry, parallel = fixed
    placed = _placed(run, parallel)

    def body(stream: tuple, layer: tuple) -> tuple[tuple, tuple]:
        x, state = stream  # the state is carried: as an output of the scan it would be copied
        parameters, index, layer_key = layer
        x, parameters = placed(x, parameters)
        block = nnx.merge(graphdef, parameters)
        inside = dataclasses.replace(context, key=layer_key)
        own = None if state is None else LayerState(state, index)
        x, own, *rest = block(x, own, positions_BxS, mask_BxS, inside, request, carry, parallel)
        return (x, own.run if isinstance(own, LayerState) else None), tuple(rest)

    if remat is not None:  # a scan's body is not merged with the pass that repeats it
        body = jax.checkpoint(body, policy=remat.policy(), prevent_cse=False)
    indices = jnp.arange(run_length(run), dtype=jnp.int32)
    (x, after), (routings, found, written) = jax.lax.scan(
        body, (x, state), (stacked, indices, layer_keys)
    )
    return x, after, routings, found, jax.tree.map(lambda a: a[-1], written)


def _placed(run: Block, parallel: Parallel | None) -> Callable[[Array, Any], tuple[Array, Any]]:
    """Says where the stream and the parameters of one layer lie while the layer runs."""
    if parallel is None:
        return lambda x, parameters: (x, parameters)
    whole = between_uses(run, parallel.rules)

    def place(x_BxSxD: Array, parameters: Any) -> tuple[Array, Any]:
        rows = batch_sharding(parallel.mesh, x_BxSxD.shape[0])
        return jax.lax.with_sharding_constraint(x_BxSxD, rows), whole(parameters, parallel.mesh)

    return place


def _by_layer(stacked: Any, length: int) -> list[Any]:
    return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(length)]


def init_state(model: DecoderLM, batch: int, length: int, dtype: Any = jnp.float32) -> State:
    """An empty sequence state for `length` tokens, one entry per run, led by the layer axis."""
    width = model.spec.width
    return tuple(_run_state(run, width, batch, length, dtype) for run in model.runs)


def _run_state(run: Block, width: int, batch: int, length: int, dtype: Any) -> Any:
    if run.spec.mixer is None:
        return None
    one = run.spec.mixer.init_state(width, batch, length, dtype)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (run_length(run), *a.shape)), one)


def layers(model: DecoderLM) -> list[Block]:
    """The blocks of a model, first to last, each on its own."""
    return [block for run in model.runs for block in unstack(run)]


def layer(model: DecoderLM, index: int) -> Block:
    """One block of a model, without a copy of the others."""
    for run in model.runs:
        if index < run_length(run):
            graphdef, stacked = nnx.split(run)
            return nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
        index -= run_length(run)
    raise IndexError(f"the model has {len(model.spec.layers)} layers")


def with_layers(model: DecoderLM, blocks: list[Block]) -> DecoderLM:
    """The model with other blocks: runs are formed anew and the spec follows the blocks."""
    changed = compat.copied(model)
    changed.spec = dataclasses.replace(model.spec, layers=tuple(block.spec for block in blocks))
    changed.runs = nnx.List(stack(blocks))
    return changed
