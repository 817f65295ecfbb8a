"""Edits of blocks as pure functions: select experts and neurons, drop parts, add a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import weights
from moejax.core import SpecError, compat
from moejax.models.block import Block
from moejax.moe import MoESpec, RankedSelector, RoutingRule, rule_tables


def select_experts(block: Block, keep: Sequence[int]) -> Block:
    """The block with only the experts `keep`, in that order: bank, router rows and router state.

    SpecError when the layer has no experts, an index is out of range or repeated, or fewer experts
    are left than the router chooses per token.
    """
    ffn = block.spec.ffn
    if not isinstance(ffn, MoESpec) or block.moe is None:
        raise SpecError(
            "this block has no experts to select.", "Select experts in MoE layers only."
        )
    if ffn.slots is not None:
        raise SpecError(
            "experts behind a slot map cannot be selected.", "Select before merging or bucketing."
        )
    if sorted(set(keep)) != sorted(keep) or not all(0 <= e < ffn.experts for e in keep):
        raise SpecError(
            f"keep = {list(keep)} is no selection of {ffn.experts} experts.",
            f"Give distinct indices from 0 to {ffn.experts - 1}.",
        )
    for variable in block.moe.router.scores.values():
        if isinstance(compat.read(variable), weights.Format):
            raise SpecError("a compressed router cannot lose experts.", "Select experts first.")
    selector = ffn.router.selector.keeping(keep, ffn.experts)
    router = dataclasses.replace(ffn.router, selector=selector)
    smaller = dataclasses.replace(ffn, experts=len(keep), router=router)
    index = jnp.asarray(list(keep), jnp.int32)
    edited = compat.copied(block)
    assert edited.moe is not None
    edited.spec = dataclasses.replace(block.spec, ffn=smaller)
    edited.moe.spec = smaller
    edited.moe.router.spec = router
    edited.moe.experts.take(index)
    edited.moe.router.take(index)
    return edited


def permute_experts(block: Block, order: Sequence[int]) -> Block:
    """The block with its experts and router rows in another order; its function stays the same."""
    ffn = block.spec.ffn
    if isinstance(ffn, MoESpec) and sorted(order) != list(range(ffn.experts)):
        raise SpecError(
            f"order = {list(order)} is no permutation.", f"Name each of {ffn.experts} experts once."
        )
    return select_experts(block, order)


def choosing(block: Block, k: int) -> Block:
    """The block whose router chooses k experts per token, with the same parameters.

    SpecError when it has no experts, its selector does not rank them, or it cannot choose so many.
    """
    ffn = block.spec.ffn
    if not isinstance(ffn, MoESpec) or not isinstance(ffn.router.selector, RankedSelector):
        raise SpecError(
            "this block has no router that chooses its k best.", "Set k of MoE layers with top-k."
        )
    router = dataclasses.replace(ffn.router, selector=ffn.router.selector.choosing(k))
    edited = compat.copied(block)
    assert edited.moe is not None
    edited.moe.spec = dataclasses.replace(ffn, router=router)
    edited.moe.router.spec = router
    edited.spec = dataclasses.replace(block.spec, ffn=edited.moe.spec)
    return edited


def with_rule(block: Block, rule: RoutingRule, tables: Mapping[str, Any]) -> Block:
    """The block with one rule more on its routing; SpecError when the layer has no experts."""
    ffn = block.spec.ffn
    if not isinstance(ffn, MoESpec) or block.moe is None:
        raise SpecError("this block has no routing.", "Add rules to MoE layers only.")
    edited = compat.copied(block)
    assert edited.moe is not None
    edited.moe.spec = dataclasses.replace(ffn, rules=(*ffn.rules, rule))
    edited.spec = dataclasses.replace(block.spec, ffn=edited.moe.spec)
    edited.moe.rules = nnx.List([*edited.moe.rules, rule_tables(dict(tables))])
    return edited


def select_neurons(block: Block, index_ExN: np.ndarray) -> Block:
    """The block whose experts keep only the hidden neurons index_ExN, each its own, in that order.

    [1, N] for a dense feed-forward. Shared experts and a dense residual stay as they are.
    SpecError where the layer has no feed-forward, its matrices have a format, its activation takes
    more than one gate per neuron, or an index is repeated or out of range.
    """
    ffn = block.spec.ffn
    bank = block.moe.experts if block.moe is not None else block.ffn
    if ffn is None or bank is None or ffn.activation.gate_blocks != 1:
        raise SpecError(
            "this block has no neurons with one gate each.",
            "Select neurons of gated feed-forwards.",
        )
    stack = (ffn.stored,) if isinstance(ffn, MoESpec) else (1,)
    sorted_ExN = np.sort(index_ExN, axis=1)
    fits = index_ExN.shape[:1] == stack and (np.diff(sorted_ExN, axis=1) > 0).all()
    if not fits or index_ExN.shape[1] < 1 or sorted_ExN.min() < 0 or sorted_ExN.max() >= ffn.width:
        raise SpecError(
            f"index of shape {index_ExN.shape} is no selection of {ffn.width} neurons for each of "
            f"{stack[0]} experts.",
            "Give distinct indices for every expert.",
        )
    edited = compat.copied(block)
    into = edited.moe.experts if edited.moe is not None else edited.ffn
    assert into is not None
    index = jnp.asarray(index_ExN if isinstance(ffn, MoESpec) else index_ExN[0])
    for variable, axis in ((into.gate, -1), (into.up, -1), (into.down, -2)):
        w = compat.read(variable)
        if isinstance(w, weights.Format):
            raise SpecError("compressed experts cannot lose neurons.", "Select neurons first.")
        at = jnp.expand_dims(index, -2 if axis == -1 else -1)
        compat.write(variable, jnp.take_along_axis(w, at, axis=axis))
    if edited.moe is not None:
        for bias in (edited.moe.experts.gate_bias, edited.moe.experts.up_bias):
            if bias is not None:
                compat.write(bias, jnp.take_along_axis(compat.read(bias), index, axis=-1))
    narrower = dataclasses.replace(ffn, width=index_ExN.shape[1])
    edited.spec = dataclasses.replace(block.spec, ffn=narrower)
    if edited.moe is not None and isinstance(narrower, MoESpec):
        edited.moe.spec = narrower
    return edited


def without_ffn(block: Block) -> Block:
    """The block without its feed-forward and the norms of it; routed experts go with their router.

    SpecError when it has none, or a dense one beside the routed one, which would lose its norm.
    """
    if block.spec.ffn is None or block.spec.dense_residual is not None:
        raise SpecError(
            "this block has no feed-forward that can go alone.",
            "Drop it where it is the only one; drop whole blocks of dense residuals.",
        )
    edited = compat.copied(block)
    edited.moe = edited.ffn = edited.ffn_norm = edited.ffn_post_norm = None
    edited.spec = dataclasses.replace(block.spec, ffn=None)
    return edited


def without_mixer(block: Block) -> Block:
    """The block without its mixer and the norms of it; SpecError when it has none.

    Layers above that read what it writes cannot do without it: `with_layers` refuses them.
    """
    if block.spec.mixer is None:
        raise SpecError("this block has no mixer.", "Drop mixers of other blocks.")
    edited = compat.copied(block)
    edited.attention = edited.attention_norm = edited.attention_post_norm = None
    edited.spec = dataclasses.replace(block.spec, mixer=None)
    return edited


def emptied(block: Block) -> Block:
    """The block without any part: the identity. It costs nothing and keeps its number."""
    edited = compat.copied(block)
    for part in ("attention", "moe", "ffn"):
        setattr(edited, part, None)
        setattr(edited, f"{part}_norm", None)
    edited.attention_post_norm = edited.ffn_post_norm = None
    edited.spec = dataclasses.replace(block.spec, mixer=None, ffn=None, dense_residual=None)
    return edited
