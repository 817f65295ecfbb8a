"""Selectors: which experts a token goes to, and what a selector remembers between steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core import SpecError, check_that, spec


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
        """The selector of a router that keeps these of its experts, in this order.

        SpecError where it would choose by another rule than before.
        """
        ...


@runtime_checkable
class RankedSelector(Selector, Protocol):
    """A selector that takes the k experts it ranks highest."""

    @property
    def k(self) -> int: ...

    def rank(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array: ...


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


@spec
class GroupLimited:
    """`selector` among the experts of the `kept` best of `groups` equal groups of neighbours.

    A group scores the sum of its `best` highest ranks: 1 in DeepSeek-V2 (arXiv:2405.04434, section
    2.2.2), 2 in DeepSeek-V3 (arXiv:2412.19437), whose ranks include the bias. The other groups
    rank at minus infinity, as in transformers 5.23.0 and DeepSeek's own code; older transformers
    put 0, which chooses from them where biased ranks are negative.
    """

    selector: RankedSelector
    groups: int
    kept: int
    best: int = 1

    def check(self) -> None:
        check_that(self.groups >= 1, self, "groups", "Use 1 for no limit.")
        check_that(1 <= self.kept <= self.groups, self, "kept", f"Keep 1 to {self.groups} groups.")
        check_that(self.best >= 1, self, "best", "Use 1 for a group's highest rank.")

    @property
    def k(self) -> int:
        return self.selector.k

    def init(self, experts: int) -> dict[str, Array]:
        return self.selector.init(experts)

    def rank(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        rank_TxE = self.selector.rank(probabilities_TxE, state)
        rank_TxGxM = rank_TxE.reshape(rank_TxE.shape[0], self.groups, -1)
        group_TxG = jax.lax.top_k(rank_TxGxM, self.best)[0].sum(-1)
        kept_TxN = jax.lax.top_k(group_TxG, self.kept)[1]
        kept_TxG = jax.nn.one_hot(kept_TxN, self.groups, dtype=bool).any(1)
        return jnp.where(kept_TxG[:, :, None], rank_TxGxM, -jnp.inf).reshape(rank_TxE.shape)

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return _highest(self, probabilities_TxE, state)

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]:
        return self.selector.next_state(counts_E, state)

    def objection(self, experts: int) -> str | None:
        if experts % self.groups:
            return f"GroupLimited.groups = {self.groups} must divide them."
        each = experts // self.groups
        if each < self.best:
            return f"A group of {each} has no {self.best} best: lower GroupLimited.best."
        if self.kept * each < self.k:
            return f"{self.kept} groups of {each} hold fewer than the {self.k} chosen experts."
        return self.selector.objection(experts)

    def keeping(self, keep: Sequence[int], experts: int) -> GroupLimited:
        each = experts // self.groups
        left = list(dict.fromkeys(expert // each for expert in keep))
        in_order = [group for group in left for _ in range(len(keep) // len(left))]
        if [expert // each for expert in keep] != in_order:
            raise SpecError(
                f"keep = {list(keep)} breaks the {self.groups} groups of {each} experts that "
                "GroupLimited chooses among.",
                "Keep equally many experts of every group that stays, group by group.",
            )
        inner = self.selector.keeping(keep, experts)
        return dataclasses.replace(self, selector=inner, groups=len(left))


def _highest(selector: RankedSelector, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
    rank_TxE = selector.rank(probabilities_TxE, state)
    return jax.lax.top_k(rank_TxE, selector.k)[1].astype(jnp.int32)


def _too_few(k: int, experts: int) -> str | None:
    return f"The router chooses {k} experts: raise experts or lower k." if k > experts else None
