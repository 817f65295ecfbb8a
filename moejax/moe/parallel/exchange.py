"""What the all-to-all strategies share: rows for each device, side by side, and where they go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from moejax_kernels.permute import permute, unpermute
from moejax_kernels.route import sort_by_expert

from moejax.moe.parallel.strategy import COMBINED, DISPATCHED, Bank, Choices, gathered

Swap = Callable[[Array], Array]


def room(factor: float | None, assignments: int, devices: int) -> int:
    """Rows that a device may send to each of `devices` others; None: all it has."""
    if factor is None:
        return assignments
    return min(assignments, math.ceil(factor * assignments / devices))


def limited(choices: Choices, bank: Bank, room_N: Array) -> tuple[Choices, Array]:
    """The choices, earlier tokens first, for which devices have room, and how many are left out.

    Room is counted by device, not by expert: busy experts use what idle ones beside them leave.
    """
    device_A = choices.expert_A // bank.local
    order = sort_by_expert(device_A, bank.devices, valid_A=choices.valid_A)
    counts_N = order.group_sizes_E
    first_N = jnp.cumsum(counts_N) - counts_N
    kept_A = choices.valid_A & (order.place_A - first_N[device_A] < room_N[device_A])
    kept = dataclasses.replace(choices, valid_TxK=kept_A.reshape(choices.valid_TxK.shape))
    return kept, jnp.sum(jnp.maximum(counts_N - room_N, 0))


def padded_exchange(
    x_TxD: Array, choices: Choices, bank: Bank, C: int, swap: Swap
) -> tuple[Array, Array]:
    """C rows to every device by `swap`, through its experts, and the same way back.

    swap: [N, C, D] -> [N, C, D], the block n of device m becomes the block m of device n.
    """
    N, D = bank.devices, x_TxD.shape[1]
    dropped = jnp.zeros((), jnp.int32)
    if choices.expert_A.size > C:
        choices, dropped = limited(choices, bank, jnp.full(N, C))
    order = sort_by_expert(choices.expert_A, bank.local * N, valid_A=choices.valid_A)
    counts_NxE = order.group_sizes_E.reshape(N, bank.local)
    sent_N = counts_NxE.sum(1)
    first_N = jnp.cumsum(sent_N) - sent_N

    place_C = jnp.arange(C)
    A = choices.expert_A.size
    from_NxC = jnp.minimum(first_N[:, None] + place_C, A - 1)
    filled_NxC = place_C < sent_N[:, None]
    assignment_R = jnp.where(filled_NxC, order.order_A[from_NxC], A).reshape(-1)
    device_A = choices.expert_A // bank.local
    place_A = order.place_A - first_N[jnp.where(choices.valid_A, device_A, 0)]
    row_A = jnp.where(choices.valid_A, device_A * C + place_A, N * C)

    sent_NxCxD = permute(x_TxD, assignment_R, row_A).reshape(N, C, D)
    got_NxCxD = checkpoint_name(swap(sent_NxCxD), DISPATCHED)
    expert_NxC = received_experts(order.group_sizes_E, bank, C)
    y_RxD = bank(got_NxCxD.reshape(N * C, D), expert_NxC.reshape(-1))
    back_NxCxD = checkpoint_name(swap(y_RxD.reshape(N, C, D)), COMBINED)
    back_RxD = back_NxCxD.reshape(N * C, D)
    return unpermute(back_RxD, choices.gate_TxK, assignment_R, row_A), dropped


def received_experts(counts_E: Array, bank: Bank, C: int) -> Array:
    """int32 [N, C]: the local expert of each row that arrives, `local` for empty ones.

    Rows of a device come in the order of experts, so that its counts say which is which: a gather
    of E integers per device.
    """
    mine_NxE = counts_for_me(counts_E, bank)
    ends_NxE = jnp.cumsum(mine_NxE, axis=1)
    return (jnp.arange(C)[:, None] >= ends_NxE[:, None, :]).sum(-1).astype(jnp.int32)


def counts_for_me(counts_E: Array, bank: Bank) -> Array:
    """int32 [N, local]: rows that each device has for each expert here."""
    all_NxNxE = gathered(counts_E, bank.axes).reshape(bank.devices, bank.devices, bank.local)
    here = lax.axis_index(bank.axes) if bank.axes else 0
    return jnp.take(all_NxNxE, here, axis=1)
