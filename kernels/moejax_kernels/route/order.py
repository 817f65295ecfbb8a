"""What a sort of assignments by expert gives."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array


class Order(NamedTuple):
    """Assignments in expert order.

    order_A: int32, the assignment at each place: those of expert 0 first, ties in list order,
        invalid ones last. place_A: int32, its inverse: the place of each assignment.
    group_sizes_E: int32, the valid assignments of each expert.
    """

    order_A: Array
    place_A: Array
    group_sizes_E: Array
