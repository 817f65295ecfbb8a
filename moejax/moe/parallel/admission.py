"""The capacity of a dispatch on a mesh: who gets a row, decided as if there were one device."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from moejax_kernels.route import sort_by_expert

from moejax.moe.dispatch import Dispatch
from moejax.moe.parallel.strategy import Choices, gathered


def admitted(
    dispatch: Dispatch,
    choices: Choices,
    experts: int,
    assignments: int,
    axes: tuple[str, ...],
) -> tuple[Choices, Array]:
    """The choices that `dispatch` has room for, and how many of this device's it has none for.

    assignments: of the whole batch. axes: of more than one device, that tokens are cut over. The
    devices tell each other how many choices each expert has, and stand in line in mesh order: what
    is dropped is what one device would drop.
    """
    limit = dispatch.room(assignments, experts)
    if limit is None:
        return choices, jnp.zeros((), jnp.int32)
    turns = choices.K if dispatch.turns else 1
    expert_A = jnp.where(choices.valid_A, choices.expert_A, 0)
    turn_A = jnp.arange(expert_A.size) % choices.K % turns
    order = sort_by_expert(expert_A * turns + turn_A, experts * turns, valid_A=choices.valid_A)
    counts_Q = order.group_sizes_E  # Q: experts times turns
    in_queue_A = order.place_A - (jnp.cumsum(counts_Q) - counts_Q)[expert_A * turns + turn_A]

    counts_NxExW = gathered(counts_Q, axes).reshape(-1, experts, turns)
    here = lax.axis_index(axes) if axes else 0
    ahead_N = jnp.arange(counts_NxExW.shape[0]) < here
    same_ExW = jnp.sum(counts_NxExW * ahead_N[:, None, None], axis=0)
    total_ExW = counts_NxExW.sum(0)
    ahead_ExW = same_ExW + jnp.cumsum(total_ExW, axis=1) - total_ExW
    room_A = in_queue_A + ahead_ExW[expert_A, turn_A] < limit
    kept_A = choices.valid_A & room_A
    kept = dataclasses.replace(choices, valid_TxK=kept_A.reshape(choices.valid_TxK.shape))
    return kept, jnp.sum(choices.valid_A & ~room_A, dtype=jnp.int32)
