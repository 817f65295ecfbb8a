"""Dispatch: from an assignment list to rows grouped by expert and back.

`plan(routing, expert_A, experts)` sorts once; the plan then scatters tokens to rows and gathers
rows to tokens. `Dense` is the oracle: every expert sees every token. `Dropless` is the default.
`Capacity` and `ChoiceCapacity` drop what an expert has no room for and count it (arXiv:2101.03961,
arXiv:2006.16668).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from moejax_kernels.permute import permute, unpermute
from moejax_kernels.route import Order, sort_by_expert

from moejax.core import check_that, spec
from moejax.moe.routing import STATIC, Routing


@runtime_checkable
class Plan(Protocol):
    """Where rows come from and where they go.

    group_sizes_E: int32, rows of each stored expert. token_R: int32, the token in each row.
    gate_R: float32, the gate weight of each row (0 for rows that serve no assignment).
    valid_R: bool, rows that serve an assignment. dropped: int32, valid assignments without a row.
    """

    @property
    def group_sizes_E(self) -> Array: ...

    @property
    def token_R(self) -> Array: ...

    @property
    def gate_R(self) -> Array: ...

    @property
    def valid_R(self) -> Array: ...

    @property
    def dropped(self) -> Array: ...

    def scatter(self, x_TxD: Array) -> Array: ...

    def gather(self, y_RxD: Array) -> Array: ...


@runtime_checkable
class Dispatch(Protocol):
    """Makes a plan from a routing, with `expert_A` already mapped to stored experts.

    turns: whether all first choices come before any second one; else tokens come in their order.
    """

    @property
    def turns(self) -> bool: ...

    def room(self, assignments: int, experts: int) -> int | None:
        """Rows of one expert where so many assignments are made; None for as many as it gets."""
        ...

    def plan(self, routing: Routing, expert_A: Array, experts: int) -> Plan: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SortedPlan:
    """Rows in expert order. assignment_R: the assignment in each row, A where the row is empty;
    row_A: the row of each assignment, R where it was dropped. Each inverts the other, so that both
    directions and their gradients are gathers."""

    group_sizes_E: Array
    token_R: Array
    gate_A: Array
    valid_R: Array
    dropped: Array
    assignment_R: Array
    row_A: Array
    token_A: Array
    tokens: int = dataclasses.field(metadata=STATIC)
    per_token: int | None = dataclasses.field(metadata=STATIC)

    @property
    def gate_R(self) -> Array:
        return jnp.where(
            self.valid_R, self.gate_A[jnp.minimum(self.assignment_R, self.row_A.size - 1)], 0.0
        )

    def scatter(self, x_TxD: Array) -> Array:
        """Rows [R, D] of the tokens each expert will see; empty rows are zero."""
        x = x_TxD if self.per_token is not None else x_TxD[self.token_A]
        return permute(x, self.assignment_R, self.row_A)

    def gather(self, y_RxD: Array) -> Array:
        """Token outputs [T, D]: the sum of a token's rows, weighed by their gates."""
        gate_TxK = self.gate_A.reshape(-1, 1 if self.per_token is None else self.per_token)
        y = unpermute(y_RxD, gate_TxK, self.assignment_R, self.row_A)
        if self.per_token is not None:
            return y
        return jax.ops.segment_sum(y, self.token_A, num_segments=self.tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DensePlan:
    """Every stored expert sees every token; the gate matrix decides what counts."""

    gate_TxE: Array
    chosen_TxE: Array
    dropped: Array

    @property
    def group_sizes_E(self) -> Array:
        T, E = self.gate_TxE.shape
        return jnp.full(E, T, jnp.int32)

    @property
    def token_R(self) -> Array:
        T, E = self.gate_TxE.shape
        return jnp.tile(jnp.arange(T, dtype=jnp.int32), E)

    @property
    def gate_R(self) -> Array:
        return self.gate_TxE.T.reshape(-1)

    @property
    def valid_R(self) -> Array:
        return self.chosen_TxE.T.reshape(-1)

    def scatter(self, x_TxD: Array) -> Array:
        return jnp.tile(x_TxD, (self.gate_TxE.shape[1], 1))

    def gather(self, y_RxD: Array) -> Array:
        T, E = self.gate_TxE.shape
        return jnp.einsum("etd,te->td", y_RxD.reshape(E, T, -1), self.gate_TxE.astype(y_RxD.dtype))


@spec
class Dense:
    """All experts on all tokens: the oracle."""

    turns = False

    def room(self, assignments: int, experts: int) -> None:
        return None

    def plan(self, routing: Routing, expert_A: Array, experts: int) -> DensePlan:
        gate_A = jnp.where(routing.valid_A, routing.gate_A, 0.0)
        empty_TxE = jnp.zeros((routing.tokens, experts), jnp.float32)
        at = (routing.token_A, expert_A)
        return DensePlan(
            gate_TxE=empty_TxE.at[at].add(gate_A),
            chosen_TxE=empty_TxE.at[at].max(routing.valid_A.astype(jnp.float32)) > 0,
            dropped=jnp.zeros((), jnp.int32),
        )


@spec
class Dropless:
    """Every assignment gets a row: one sort, R = A (arXiv:2211.15841 without its blocks)."""

    turns = False

    def room(self, assignments: int, experts: int) -> None:
        return None

    def plan(self, routing: Routing, expert_A: Array, experts: int) -> SortedPlan:
        order = sort_by_expert(expert_A, experts, valid_A=routing.valid_A)
        A = expert_A.size
        filled_R = jnp.arange(A) < order.group_sizes_E.sum()
        return SortedPlan(
            group_sizes_E=order.group_sizes_E,
            token_R=routing.token_A[order.order_A],
            gate_A=routing.gate_A,
            valid_R=filled_R,
            dropped=jnp.zeros((), jnp.int32),
            assignment_R=jnp.where(filled_R, order.order_A, A),
            row_A=jnp.where(routing.valid_A, order.place_A, A),
            token_A=routing.token_A,
            tokens=routing.tokens,
            per_token=routing.per_token,
        )


@spec
class Capacity:
    """At most C = ceil(factor * A / E) rows per expert, in token order; drops are counted."""

    factor: float = 1.25
    turns = False

    def check(self) -> None:
        check_that(self.factor > 0, self, "factor", "1.0 fits perfect balance only; try 1.25.")

    def room(self, assignments: int, experts: int) -> int:
        return min(assignments, math.ceil(self.factor * assignments / experts))

    def plan(self, routing: Routing, expert_A: Array, experts: int) -> SortedPlan:
        order = sort_by_expert(expert_A, experts, valid_A=routing.valid_A)
        C = self.room(expert_A.size, experts)
        return _limited(routing, expert_A, C, order)


@spec
class ChoiceCapacity:
    """Capacity where every first choice has its row before any second one (arXiv:2006.16668).

    C = floor(factor * A / E), made even, and at least `least`: OpenMoE's port (arXiv:2402.01739).
    """

    factor: float = 2.0
    least: int = 4
    turns = True

    def check(self) -> None:
        check_that(self.factor > 0, self, "factor", "1.0 fits perfect balance only; try 2.0.")
        check_that(self.least >= 1, self, "least", "An expert needs room for at least one row.")

    def room(self, assignments: int, experts: int) -> int:
        C = math.floor(self.factor * assignments / experts)
        return min(assignments, max(C + C % 2, self.least))

    def plan(self, routing: Routing, expert_A: Array, experts: int) -> SortedPlan:
        A, K = expert_A.size, routing.per_token or 1
        C = self.room(A, experts)
        queue_A = jnp.arange(A, dtype=jnp.int32).reshape(-1, K).T.reshape(-1)
        turn_A = jnp.arange(A, dtype=jnp.int32).reshape(K, -1).T.reshape(-1)  # undoes queue_A
        queued = sort_by_expert(expert_A[queue_A], experts, valid_A=routing.valid_A[queue_A])
        order = queued._replace(order_A=queue_A[queued.order_A], place_A=queued.place_A[turn_A])
        return _limited(routing, expert_A, C, order)


def _limited(routing: Routing, expert_A: Array, C: int, order: Order) -> SortedPlan:
    """C rows per expert, for the first of its assignments in the order."""
    counts_E = order.group_sizes_E
    A, experts = expert_A.size, counts_E.size
    first_E = jnp.cumsum(counts_E) - counts_E
    expert_R = jnp.repeat(jnp.arange(experts), C)
    place_R = jnp.tile(jnp.arange(C), experts)
    filled_R = place_R < counts_E[expert_R]
    assignment_R = jnp.where(
        filled_R, order.order_A[jnp.minimum(first_E[expert_R] + place_R, A - 1)], A
    )
    place_A = order.place_A - first_E[expert_A]
    kept_A = routing.valid_A & (place_A < C)
    return SortedPlan(
        group_sizes_E=jnp.full(experts, C, jnp.int32),
        token_R=routing.token_A[jnp.minimum(assignment_R, A - 1)],
        gate_A=routing.gate_A,
        valid_R=filled_R,
        dropped=jnp.sum(jnp.maximum(counts_E - C, 0)),
        assignment_R=assignment_R,
        row_A=jnp.where(kept_A, expert_A * C + place_A, experts * C),
        token_A=routing.token_A,
        tokens=routing.tokens,
        per_token=routing.per_token,
    )
