"""The interface of parallel strategies, and what they are handed inside the routed block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax
from moejax_kernels.permute import permute, unpermute
from moejax_kernels.route import Order, sort_by_expert

from moejax.mesh import MeshLike, Rules

DISPATCHED = "moe_dispatched"  # names for jax.checkpoint policies: rows that came to their experts
COMBINED = "moe_combined"  # and rows that came back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """The K choices of each token of this device.

    expert_TxK: int32, stored experts as the devices hold them, those of the first device first.
    gate_TxK: float32. valid_TxK: bool, False for padding and for choices that were taken back.
    """

    expert_TxK: Array
    gate_TxK: Array
    valid_TxK: Array

    @property
    def K(self) -> int:
        return self.expert_TxK.shape[1]

    @property
    def expert_A(self) -> Array:
        return self.expert_TxK.reshape(-1)

    @property
    def valid_A(self) -> Array:
        return self.valid_TxK.reshape(-1)


Sorted = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Bank:
    """The experts that this device holds, and the devices that hold the others.

    local: experts here; devices: how many devices hold the whole bank along the mesh axes `axes`
    (of more than one device, slow links first); model: parts of every expert's hidden width.
    products: (rows_RxD sorted by local expert, group_sizes) -> rows_RxD, with the experts here.
    """

    local: int
    devices: int
    axes: tuple[str, ...]
    model: int
    products: Sorted

    def __call__(self, rows_RxD: Array, expert_R: Array) -> Array:
        """Rows in any order through their local experts; expert_R = `local` for empty rows."""
        order = sort_by_expert(expert_R, self.local, valid_A=expert_R < self.local)
        sorted_RxD = permute(rows_RxD, order.order_A, order.place_A)
        return permute(self.products(sorted_RxD, order.group_sizes_E), order.place_A, order.order_A)


@runtime_checkable
class Strategy(Protocol):
    """Who computes what of a routed block; a frozen spec, called inside shard_map.

    token_axes: what tokens are cut over in the block; none where every device sees all of them.
    bank_axes: what experts are cut over; none where every device has them all. sums_model: whether
    what it returns is a part that is still to be summed over `model`.
    """

    @property
    def token_axes(self) -> tuple[str, ...]: ...

    @property
    def bank_axes(self) -> tuple[str, ...]: ...

    @property
    def sums_model(self) -> bool: ...

    def __call__(self, x_TxD: Array, choices: Choices, bank: Bank) -> tuple[Array, Array]:
        """y_TxD of the tokens of this device, and how many of their choices found no room."""
        ...


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a model runs on a mesh: a property of the run, not of the model. Hashable."""

    mesh: MeshLike
    strategy: Strategy
    rules: Rules = Rules()


def through_experts(
    x_TxD: Array, choices: Choices, experts: int, products: Sorted, first: int | Array = 0
) -> Array:
    """y_TxD of the choices among `experts` experts from `first` on; others count as invalid."""
    mine_A = choices.expert_A - first
    valid_A = choices.valid_A & (mine_A >= 0) & (mine_A < experts)
    order = sort_by_expert(mine_A, experts, valid_A=valid_A)
    assignment_R, row_A = both_ways(order, valid_A)
    rows_RxD = products(permute(x_TxD, assignment_R, row_A), order.group_sizes_E)
    return unpermute(rows_RxD, choices.gate_TxK, assignment_R, row_A)


def both_ways(order: Order, valid_A: Array) -> tuple[Array, Array]:
    """assignment_R and row_A of `moejax_kernels.permute` where every valid assignment has a row."""
    A = valid_A.size
    filled_R = jnp.arange(A) < order.group_sizes_E.sum()
    return jnp.where(filled_R, order.order_A, A), jnp.where(valid_A, order.place_A, A)


def none_dropped() -> Array:
    """The count of a strategy that has room for everything."""
    return jnp.zeros((), jnp.int32)


def gathered(array: Array, axes: tuple[str, ...]) -> Array:
    """[N, ...]: the array of every device along `axes`, in their order."""
    return lax.all_gather(array, axes, axis=0) if axes else array[None]
