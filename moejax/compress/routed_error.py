"""What a layer's output loses when one of its experts goes onto a grid (arXiv:2410.06270)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax import weights
from moejax.compress.block_weights import block_weights, expert_matrices, with_block_weights
from moejax.compress.methods import Choice, FullPrecision
from moejax.core import SpecError, compat
from moejax.core.taps import NOTHING
from moejax.models import Block
from moejax.moe import MoELayer, Plan, RouterContext, SlotMap


def routed_errors(
    block: Block, x_TxD: np.ndarray | Array, grids: Sequence[Choice], *, layer: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """eps[e, b] = ||Y - Y[stored expert e rounded to grids[b]]||_F on the inputs of the layer.

    Returns float64 [E, B], and int64 [E], how many of the tokens x_TxD reach each expert: where
    none does, eps is 0 because nothing was measured. Exact, not an estimate: the router sees the
    same inputs, so an expert alone changes its own rows, by gate (y - y^). `FullPrecision` costs 0.
    Tokens are routed once; each grid then takes one pass of the whole bank. layer: for errors.
    """
    moe = _moe(block)
    x_TxD = jnp.asarray(x_TxD, jnp.float32)
    routed = _route(*nnx.split(moe), x_TxD)
    name = "" if layer is None else f"layers.{layer}."
    errors = [
        jnp.zeros(moe.spec.stored)
        if isinstance(grid, FullPrecision)
        else _errors(*nnx.split(_moe(_rounded(block, grid, name)).experts), routed)
        for grid in grids
    ]
    error_ExB = np.asarray(jnp.stack(errors, axis=1), np.float64)
    return error_ExB, np.asarray(routed["count_E"], np.int64)


def stored_sums(block: Block, value_E: np.ndarray) -> np.ndarray:
    """Sums per router expert as sums per stored expert, copies sharing alike: float64 [stored]."""
    moe = _moe(block)
    value_E = np.asarray(value_E, np.float64)
    if moe.slots is None:
        return value_E
    slot_ExM, copies_E = (np.asarray(compat.read(moe.slots[name])) for name in ("slot", "copies"))
    counts_ExM = np.arange(slot_ExM.shape[1]) < copies_E[:, None]
    share_ExM = np.where(counts_ExM, (value_E / copies_E)[:, None], 0.0)
    return np.bincount(slot_ExM.ravel(), share_ExM.ravel(), minlength=moe.spec.stored)


def _moe(block: Block) -> MoELayer:
    if block.moe is None:
        raise SpecError("this block has no experts.", "Score and allocate in MoE layers only.")
    return block.moe


def _rounded(block: Block, grid: Choice, name: str) -> Block:
    """The block with all experts rounded to nearest, as plain arrays: one program for all grids."""
    named = block_weights(block)
    return with_block_weights(
        block,
        {m: weights.materialize(grid(_plain(named[m]), name + m)) for m in expert_matrices(block)},
    )


def _plain(w: Any) -> Array:
    return weights.materialize(w) if isinstance(w, weights.Format) else w


@functools.partial(jax.jit, static_argnames="graphdef")
def _route(graphdef: Any, state: Any, x_TxD: Array) -> dict[str, Any]:
    """The plan of the layer, its rows before and after the experts, and what a row weighs.

    share_R: gate of a row times all gates that its token gives to its expert. Two router experts
    may share a stored one, and then both rows of a token change together.
    """
    moe = nnx.merge(graphdef, state)
    E = moe.spec.stored
    routing = moe.router(x_TxD, RouterContext())
    expert_A = routing.expert_A
    if moe.slots is not None:
        slots = SlotMap(*(compat.read(moe.slots[name]) for name in ("slot", "copies")))
        expert_A = slots(expert_A, routing.token_A)
    plan: Plan = moe.spec.dispatch.plan(routing, expert_A, E)
    rows_RxD = plan.scatter(x_TxD)
    y_RxD, _ = moe.experts(rows_RxD, plan.group_sizes_E, NOTHING)
    ends_E = jnp.cumsum(plan.group_sizes_E)
    row_R = jnp.arange(plan.token_R.size)
    expert_R = jnp.minimum(jnp.searchsorted(ends_E, row_R, side="right"), E - 1)
    gate_R = jnp.where(plan.valid_R, plan.gate_R, 0.0)
    at = (plan.token_R, expert_R)
    gate_TxE = jnp.zeros((x_TxD.shape[0], E), jnp.float32).at[at].add(gate_R)
    reached_TxE = jnp.zeros(gate_TxE.shape, bool).at[at].max(plan.valid_R)
    return {
        "sizes_E": plan.group_sizes_E,
        "rows_RxD": rows_RxD,
        "y_RxD": y_RxD,
        "expert_R": expert_R,
        "share_R": gate_R * gate_TxE[at],
        "count_E": reached_TxE.sum(0),
    }


@functools.partial(jax.jit, static_argnames="graphdef")
def _errors(graphdef: Any, state: Any, routed: dict[str, Any]) -> Array:
    """float32 [E]."""
    experts = nnx.merge(graphdef, state)
    near_RxD, _ = experts(routed["rows_RxD"], routed["sizes_E"], NOTHING)
    square_R = jnp.square(routed["y_RxD"] - near_RxD).sum(-1) * routed["share_R"]
    sums_E = jax.ops.segment_sum(square_R, routed["expert_R"], routed["sizes_E"].size)
    return jnp.sqrt(jnp.maximum(sums_E, 0))
