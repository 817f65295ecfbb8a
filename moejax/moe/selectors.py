"""Selectors: which experts a token goes to, and what a selector remembers between steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.core import check_that, spec


@runtime_checkable
class Selector(Protocol):
    """Chooses experts by probability: `choose(...) -> expert_TxK`, and the next state.

    init: the state of E experts, every array led by the axis E.
    """

    def init(self, experts: int) -> dict[str, Array]: ...

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array: ...

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]: ...

    def objection(self, experts: int) -> str | None:
        """What to mend where it cannot choose among so many experts; None where it can."""
        ...

    def keeping(self, keep: Sequence[int], experts: int) -> Selector:
        """The selector of a router that keeps these of its experts, in this order."""
        ...


@runtime_checkable
class RankedSelector(Selector, Protocol):
    """A selector that takes the k experts it ranks highest."""

    @property
    def k(self) -> int: ...

    def rank(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array: ...

    def choosing(self, k: int) -> RankedSelector:
        """The selector that takes so many instead."""
        ...


@spec
class TopK:
    """The k experts of highest probability."""

    k: int

    def check(self) -> None:
        check_that(self.k >= 1, self, "k", "Choose at least one expert per token.")

    def init(self, experts: int) -> dict[str, Array]:
        return {}

    def rank(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return probabilities_TxE

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return _highest(self, probabilities_TxE, state)

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]:
        return state

    def objection(self, experts: int) -> str | None:
        return _too_few(self.k, experts)

    def keeping(self, keep: Sequence[int], experts: int) -> TopK:
        return self

    def choosing(self, k: int) -> TopK:
        return dataclasses.replace(self, k=k)


@spec
class BiasedTopK:
    """Top-k of probability + bias; the bias chases balance without a gradient (arXiv:2408.15664).

    After each step b_i += rate * sign(mean count - count_i). Gate weights never see the bias.
    """

    k: int
    rate: float = 1e-3

    def check(self) -> None:
        check_that(self.k >= 1, self, "k", "Choose at least one expert per token.")
        check_that(self.rate >= 0, self, "rate", "Use 0 to freeze the bias.")

    def init(self, experts: int) -> dict[str, Array]:
        return {"bias": jnp.zeros(experts, jnp.float32)}

    def rank(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return probabilities_TxE + state["bias"]

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return _highest(self, probabilities_TxE, state)

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]:
        return {"bias": state["bias"] + self.rate * jnp.sign(jnp.mean(counts_E) - counts_E)}

    def objection(self, experts: int) -> str | None:
        return _too_few(self.k, experts)

    def keeping(self, keep: Sequence[int], experts: int) -> BiasedTopK:
        return self

    def choosing(self, k: int) -> BiasedTopK:
        return dataclasses.replace(self, k=k)


@spec
class GroupLimited:
    """`selector` among the experts of the `kept` best of `groups` groups.

    A group scores the sum of its `best` highest ranks: 1 in DeepSeek-V2 (arXiv:2405.04434, section
    2.2.2), 2 in DeepSeek-V3 (arXiv:2412.19437), whose ranks include the bias. The other groups
    rank at minus infinity, as in transformers 5.23.0 and DeepSeek's own code; older transformers
    put 0, which chooses from them where biased ranks are negative.
    members: the group of each expert; empty for equal groups of neighbours, as models are released.
    Experts that were moved or dropped leave others; a group that has fewer than `best` experts left
    then scores minus infinity, as if the others could not be chosen.
    """

    selector: RankedSelector
    groups: int
    kept: int
    best: int = 1
    members: tuple[int, ...] = ()

    def check(self) -> None:
        check_that(self.groups >= 1, self, "groups", "Use 1 for no limit.")
        check_that(1 <= self.kept <= self.groups, self, "kept", f"Keep 1 to {self.groups} groups.")
        check_that(self.best >= 1, self, "best", "Use 1 for a group's highest rank.")
        known = all(0 <= group < self.groups for group in self.members)
        check_that(known, self, "members", f"Groups are 0 to {self.groups - 1}.")

    @property
    def k(self) -> int:
        return self.selector.k

    def init(self, experts: int) -> dict[str, Array]:
        return self.selector.init(experts)

    def rank(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        rank_TxE = self.selector.rank(probabilities_TxE, state)
        group_E = self._group_E(rank_TxE.shape[1])
        # [G, M], the experts of each group; short groups are filled up with an expert E.
        of_groups = [np.flatnonzero(group_E == group) for group in range(self.groups)]
        largest = max(len(experts) for experts in of_groups)
        fill = len(group_E)
        expert_GxM = np.full((self.groups, largest), fill)
        for row, experts in zip(expert_GxM, of_groups, strict=True):
            row[: len(experts)] = experts
        rank_TxGxM = rank_TxE.at[:, expert_GxM].get(mode="fill", fill_value=-jnp.inf)
        score_TxG = jax.lax.top_k(rank_TxGxM, self.best)[0].sum(-1)
        kept_TxN = jax.lax.top_k(score_TxG, self.kept)[1]
        kept_TxG = jax.nn.one_hot(kept_TxN, self.groups, dtype=bool).any(1)
        return jnp.where(kept_TxG[:, group_E], rank_TxE, -jnp.inf)

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return _highest(self, probabilities_TxE, state)

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]:
        return self.selector.next_state(counts_E, state)

    def objection(self, experts: int) -> str | None:
        if self.members and len(self.members) != experts:
            return f"GroupLimited.members has the groups of {len(self.members)}."
        if not self.members and experts % self.groups:
            return f"GroupLimited.groups = {self.groups} must divide them."
        sizes = np.sort(np.bincount(self._group_E(experts), minlength=self.groups))
        if sizes[-1] < self.best:
            return f"No group has {self.best} best of {sizes[-1]}: lower GroupLimited.best."
        if sizes[: self.kept].sum() < self.k:
            return f"{self.kept} groups may hold fewer than the {self.k} chosen experts."
        return self.selector.objection(experts)

    def keeping(self, keep: Sequence[int], experts: int) -> GroupLimited:
        left, group = np.unique(self._group_E(experts)[list(keep)], return_inverse=True)
        groups = len(left)
        neighbours = np.arange(len(keep)) * groups // max(len(keep), 1)
        as_released = len(keep) % max(groups, 1) == 0 and np.array_equal(group, neighbours)
        return dataclasses.replace(
            self,
            selector=self.selector.keeping(keep, experts),
            groups=groups,
            kept=min(self.kept, groups),
            members=() if as_released else tuple(group.tolist()),
        )

    def choosing(self, k: int) -> GroupLimited:
        return dataclasses.replace(self, selector=self.selector.choosing(k))

    def _group_E(self, experts: int) -> np.ndarray:
        neighbours = np.arange(experts) * self.groups // experts
        return np.asarray(self.members, np.int64) if self.members else neighbours


def _highest(selector: RankedSelector, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
    rank_TxE = selector.rank(probabilities_TxE, state)
    return jax.lax.top_k(rank_TxE, selector.k)[1].astype(jnp.int32)


def _too_few(k: int, experts: int) -> str | None:
    return f"The router chooses {k} experts: raise experts or lower k." if k > experts else None
