"""Experts made one: hidden units as points, their order, and banks behind a slot map."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import SpecError, compat
from moejax.core.axes import EXPERT
from moejax.models.block import Block
from moejax.moe import Fixed, GatedExperts, MoESpec, Router, SlotSpec

MATRICES = ("gate", "up", "down")


def hidden_units(block: Block) -> np.ndarray:
    """units_ExFxP float64: all numbers that belong to each hidden unit of each stored expert.

    Its columns of gate and up with their biases, and its row of down; [E, F, P]. SpecError where
    there are no experts or they are not plain arrays.
    """
    bank = _bank(block)
    gate, up, down = (np.asarray(compat.read(getattr(bank, name)), np.float64) for name in MATRICES)
    E, _, F = up.shape
    # Gates of several blocks are [block 0 of all units, block 1 of all units, ...].
    parts = [np.moveaxis(gate.reshape(E, -1, F), 1, 2), np.moveaxis(up, 1, 2), down]
    for bias in (bank.gate_bias, bank.up_bias):
        if bias is not None:
            value = np.asarray(compat.read(bias), np.float64)
            parts.append(np.moveaxis(value.reshape(E, -1, F), 1, 2))
    return np.concatenate(parts, axis=-1)


def permute_hidden(block: Block, order_ExF: np.ndarray) -> Block:
    """The block with each stored expert's hidden units in another order; its function stays."""
    bank = _bank(block)
    E, F, _ = compat.read(bank.down).shape
    order_ExF = np.asarray(order_ExF)
    if order_ExF.shape != (E, F) or (np.sort(order_ExF, axis=1) != np.arange(F)).any():
        raise SpecError(
            f"an order of shape {order_ExF.shape} permutes no {F} hidden units of {E} experts.",
            f"Give for each of {E} experts every number from 0 to {F - 1} once.",
        )
    edited = compat.copied(block)
    new = _bank(edited)
    order = jnp.asarray(order_ExF)
    for name in ("gate", "up", "gate_bias", "up_bias"):
        variable = getattr(new, name)
        if variable is not None:
            compat.write(variable, _columns(compat.read(variable), order))
    compat.write(new.down, jnp.take_along_axis(compat.read(new.down), order[..., None], axis=1))
    return edited


def merge_experts(block: Block, group_E: np.ndarray, mix_GxE: np.ndarray) -> Block:
    """The block with G stored experts, sum_e mix[g, e] expert_e each, behind a slot map.

    group_E: which of them takes the place of each stored expert: router experts are sent there, and
    the router stays as it is, so that a token that chose two experts of a group gets the merged one
    with the sum of their gates (arXiv:2310.01334). Matrices and biases alike; mixed in float32.
    Experts behind a slot map already are merged further. SpecError for weights that are not plain
    arrays, groups that are not 0 to G - 1, or a mix of another shape.
    """
    bank = _bank(block)
    ffn = block.spec.ffn
    assert isinstance(ffn, MoESpec) and block.moe is not None
    group_E, mix_GxE = np.asarray(group_E), np.asarray(mix_GxE)
    G = len(mix_GxE)
    if (
        group_E.shape != (ffn.stored,)
        or mix_GxE.shape[1:] != (ffn.stored,)
        or set(group_E.tolist()) != set(range(G))
    ):
        raise SpecError(
            f"groups {group_E.tolist()} and a mix of shape {mix_GxE.shape} merge no "
            f"{ffn.stored} experts.",
            "Number the groups from 0, and give a coefficient for every group and expert.",
        )
    slot, copies = jnp.arange(ffn.experts)[:, None], jnp.ones(ffn.experts, jnp.int32)
    if block.moe.slots is not None:
        slot, copies = (compat.read(block.moe.slots[name]) for name in ("slot", "copies"))
    slots = SlotSpec(stored=G, copies=slot.shape[1])
    edited = compat.copied(block)
    assert edited.moe is not None
    for name in (*MATRICES, "gate_bias", "up_bias", "down_bias"):
        variable = getattr(edited.moe.experts, name)
        if variable is not None:
            compat.write(variable, _mixed(compat.read(getattr(bank, name)), mix_GxE))
    new_slot = jnp.asarray(group_E, jnp.int32)[slot]
    edited.moe.slots = nnx.data(nnx.Dict({"slot": Fixed(new_slot), "copies": Fixed(copies)}))
    edited.moe.spec = dataclasses.replace(ffn, slots=slots)
    edited.spec = dataclasses.replace(block.spec, ffn=edited.moe.spec)
    return edited


def merge_router(block: Block, mix_GxE: np.ndarray) -> Block:
    """The block whose router has one row per stored expert, and no slot map any more.

    mix_GxE: how the rows of router experts make those of the G stored ones, sums of 1; the state of
    a selector is mixed alike. SpecError where there is no slot map, an expert has copies, the mix
    has another shape, or the router's scores are compressed or no rows of single experts.
    """
    ffn = block.spec.ffn
    if not isinstance(ffn, MoESpec) or block.moe is None or block.moe.slots is None:
        raise SpecError("this block has no slot map.", "Merge its experts before router rows.")
    if compat.read(block.moe.slots["slot"]).shape[1] > 1:
        raise SpecError("an expert of this block has copies.", "Merge router rows before that.")
    if mix_GxE.shape != (ffn.stored, ffn.experts):
        raise SpecError(
            f"a mix of shape {mix_GxE.shape} makes no rows of {ffn.stored} stored experts.",
            f"Give one row of {ffn.experts} numbers for each.",
        )
    heads = tuple(int(e) for e in np.argmax(mix_GxE > 0, axis=1))
    selector = ffn.router.selector.keeping(heads, ffn.experts)
    router = dataclasses.replace(ffn.router, selector=selector)
    edited = compat.copied(block)
    assert edited.moe is not None
    _mix_rows(edited.moe.router, mix_GxE)
    edited.moe.slots = None
    edited.moe.spec = dataclasses.replace(ffn, experts=ffn.stored, router=router, slots=None)
    edited.moe.router.spec = router
    edited.spec = dataclasses.replace(block.spec, ffn=edited.moe.spec)
    return edited


def _mix_rows(router: Router, mix_GxE: np.ndarray) -> None:
    axes = router.spec.scores.axes()
    if not any(EXPERT in names for names in axes.values()):
        raise SpecError(
            f"{type(router.spec.scores).__name__} has no scores of single experts to mix.",
            "Merge experts of such a router behind a slot map.",
        )
    found = [
        (variable, axes[name].index(EXPERT))
        for name, variable in router.scores.items()
        if EXPERT in axes[name]
    ]
    for variable, axis in [*found, *((v, 0) for v in router.selector.values())]:
        value = compat.read(variable)
        if isinstance(value, weights.Format):
            raise SpecError("a compressed router has no rows to mix.", "Merge rows first.")
        rows = jnp.moveaxis(value, axis, 0)
        compat.write(variable, jnp.moveaxis(_mixed(rows, mix_GxE), 0, axis))


def _bank(block: Block) -> GatedExperts:
    """The experts of a block, all of them plain arrays."""
    if block.moe is None:
        raise SpecError("this block has no experts.", "Merge experts in MoE layers only.")
    for name in MATRICES:
        value = compat.read(getattr(block.moe.experts, name))
        if isinstance(value, weights.Format):
            raise SpecError(
                f"moe.experts.{name} is already stored as {type(value).__name__}, "
                "whose experts cannot be mixed.",
                "Align and merge experts before a pass changes their format.",
            )
    return block.moe.experts


def _columns(value: Array, order_ExF: Array) -> Array:
    """The last axis, blocks of F units, in another order for each expert."""
    E, F = order_ExF.shape
    blocks = value.reshape(*value.shape[:-1], -1, F)
    index = order_ExF.reshape(E, *([1] * (blocks.ndim - 2)), F)
    return jnp.take_along_axis(blocks, index, axis=-1).reshape(value.shape)


def _mixed(value: Array, mix_GxE: np.ndarray) -> Array:
    """A group of one expert keeps it bit for bit."""
    mix, wide = jnp.asarray(mix_GxE, jnp.float32), value.astype(jnp.float32)
    mixed = jnp.einsum("ge,e...->g...", mix, wide, precision=jax.lax.Precision.HIGHEST)
    return mixed.astype(value.dtype)
