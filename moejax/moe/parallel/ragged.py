"""An all-to-all that carries the rows there are, and no padding."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from moejax_kernels.permute import permute, unpermute
from moejax_kernels.platforms import alike, varying_like
from moejax_kernels.route import sort_by_expert

from moejax.core import check_that, spec
from moejax.mesh import BANK_AXES, TOKEN_AXES
from moejax.moe.parallel.exchange import limited
from moejax.moe.parallel.strategy import (
    COMBINED,
    DISPATCHED,
    Bank,
    Choices,
    both_ways,
    gathered,
)


@spec
class RaggedAllToAll:
    """Devices tell each other how many rows they send, then send just those (FastMoE's exchange).

    arXiv:2103.13262; `lax.ragged_all_to_all` on TPUs and GPUs. CPUs have none: there the same rows
    travel in a padded all-to-all. factor: rows that a device has room for, as a multiple of the A
    choices it would get under perfect balance; what comes beyond is dropped, counted, and not sent.
    None: room for whatever may come, N A rows, of which memory must be there.
    """

    factor: float | None = None
    token_axes = TOKEN_AXES
    bank_axes = BANK_AXES
    sums_model = True

    def check(self) -> None:
        enough = self.factor is None or self.factor > 0
        check_that(enough, self, "factor", "1.0 fits perfect balance only; None drops nothing.")

    def __call__(self, x_TxD: Array, choices: Choices, bank: Bank) -> tuple[Array, Array]:
        N, A = bank.devices, choices.expert_A.size
        M = N * A if self.factor is None else min(N * A, math.ceil(self.factor * A))
        choices, dropped = _fitting(choices, bank, M)
        order = sort_by_expert(choices.expert_A, bank.local * N, valid_A=choices.valid_A)
        assignment_R, row_A = both_ways(order, choices.valid_A)
        counts_NxNxE = gathered(order.group_sizes_E, bank.axes).reshape(N, N, bank.local)
        here = lax.axis_index(bank.axes) if bank.axes else 0
        there = Sizes.of(counts_NxNxE.sum(-1), here)

        sent_RxD = permute(x_TxD, assignment_R, row_A)
        got_MxD = checkpoint_name(swap(sent_RxD, M, there, bank.axes), DISPATCHED)
        y_MxD = bank(got_MxD, _experts(jnp.take(counts_NxNxE, here, axis=1), M))
        back_RxD = checkpoint_name(swap(y_MxD, A, there.reversed(), bank.axes), COMBINED)
        return unpermute(back_RxD, choices.gate_TxK, assignment_R, row_A), dropped


class Sizes(NamedTuple):
    """How many rows go from here to each device, where they start here and there, and the same of
    rows that come here; int32 [N] each."""

    sent: Array
    start: Array
    start_there: Array
    got: Array
    got_start: Array
    got_start_there: Array

    @classmethod
    def of(cls, rows_NxN: Array, here: Array | int) -> Sizes:
        """rows_NxN: from each device to each; every device holds them one sender after another."""
        before_source = jnp.cumsum(rows_NxN, axis=0) - rows_NxN
        before_target = jnp.cumsum(rows_NxN, axis=1) - rows_NxN
        return cls(
            sent=jnp.take(rows_NxN, here, axis=0),
            start=jnp.take(before_target, here, axis=0),
            start_there=jnp.take(before_source, here, axis=0),
            got=jnp.take(rows_NxN, here, axis=1),
            got_start=jnp.take(before_source, here, axis=1),
            got_start_there=jnp.take(before_target, here, axis=1),
        )

    def reversed(self) -> Sizes:
        """Of the way back."""
        return Sizes(*self[3:], *self[:3])


def swap(rows_RxD: Array, out_rows: int, sizes: Sizes, axes: tuple[str, ...]) -> Array:
    """Rows [out_rows, D] that the devices along `axes` send here, one sender after another."""
    if not axes:
        return _resized(rows_RxD, out_rows)
    rows_RxD, *sizes_N = alike(rows_RxD, *sizes)
    return _swap(out_rows, axes, rows_RxD, Sizes(*sizes_N))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swap(out_rows: int, axes: tuple[str, ...], rows_RxD: Array, sizes: Sizes) -> Array:
    ways = {"cpu": _padded, "default": _ragged}
    ways = {name: functools.partial(way, out_rows, axes) for name, way in ways.items()}
    return lax.platform_dependent(rows_RxD, sizes, **ways)


def _swap_forward(
    out_rows: int, axes: tuple[str, ...], rows_RxD: Array, sizes: Sizes
) -> tuple[Array, tuple[int, Sizes]]:
    return _swap(out_rows, axes, rows_RxD, sizes), (rows_RxD.shape[0], sizes)


def _swap_backward(
    out_rows: int, axes: tuple[str, ...], saved: tuple[int, Sizes], d_MxD: Array
) -> tuple[Array, None]:
    rows, sizes = saved
    return _swap(rows, axes, d_MxD, sizes.reversed()), None


_swap.defvjp(_swap_forward, _swap_backward)


def _ragged(out_rows: int, axes: tuple[str, ...], rows_RxD: Array, sizes: Sizes) -> Array:
    empty = jnp.zeros((out_rows, rows_RxD.shape[1]), rows_RxD.dtype)
    return lax.ragged_all_to_all(
        rows_RxD,
        varying_like(empty, rows_RxD),
        sizes.start,
        sizes.sent,
        sizes.start_there,
        sizes.got,
        axis_name=axes,
    )


def _padded(out_rows: int, axes: tuple[str, ...], rows_RxD: Array, sizes: Sizes) -> Array:
    rows = rows_RxD.shape[0]
    place = jnp.arange(min(rows, out_rows))
    from_NxC = jnp.where(place < sizes.sent[:, None], sizes.start[:, None] + place, rows)
    blocks = rows_RxD.at[from_NxC].get(mode="fill", fill_value=0)
    got = lax.all_to_all(blocks, axes, split_axis=0, concat_axis=0, tiled=True)
    row_M = jnp.arange(out_rows)
    source_M = jnp.searchsorted(sizes.got_start + sizes.got, row_M, side="right")
    at_M = row_M - sizes.got_start.at[source_M].get(mode="fill", fill_value=0)
    return got.at[source_M, at_M].get(mode="fill", fill_value=0)


def _fitting(choices: Choices, bank: Bank, M: int) -> tuple[Choices, Array]:
    """The choices for which there is room where they go, senders in mesh order."""
    if choices.expert_A.size * bank.devices <= M:
        return choices, jnp.zeros((), jnp.int32)
    device_A = choices.expert_A // bank.local
    counts_N = sort_by_expert(device_A, bank.devices, valid_A=choices.valid_A).group_sizes_E
    rows_NxN = gathered(counts_N, bank.axes)
    here = lax.axis_index(bank.axes) if bank.axes else 0
    ahead_N = jnp.take(jnp.cumsum(rows_NxN, axis=0) - rows_NxN, here, axis=0)
    return limited(choices, bank, jnp.maximum(M - ahead_N, 0))


def _experts(counts_NxE: Array, M: int) -> Array:
    """int32 [M]: the local expert of each row that came, `local` for empty ones."""
    ends = jnp.cumsum(counts_NxE.reshape(-1))
    segment_M = jnp.searchsorted(ends, jnp.arange(M), side="right")
    local = counts_NxE.shape[1]
    return jnp.where(segment_M < ends.size, segment_M % local, local).astype(jnp.int32)


def _resized(rows_RxD: Array, rows: int) -> Array:
    more = rows - rows_RxD.shape[0]
    return jnp.pad(rows_RxD, ((0, more), (0, 0))) if more > 0 else rows_RxD[:rows]
