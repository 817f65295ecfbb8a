"""Channels that go while a model trains: LoSparse's schedule around any optimizer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from moejax.core import SpecError, check_that, spec
from moejax.models.partition import Leaves
from moejax.train.optimizer import AdamW, Optimizer

PRUNED = ".terms[1]"
"""What names of leaves end in that lose channels: the second term of a `weights.Sum`."""


@spec
class PrunesChannels:
    """`optimizer`, and output channels of S that go as w = u v + S trains (arXiv:2306.11222).

    S is the array that is the second term of a sum, [*lead, K, N]. After step t the importance of
    output n of each matrix is I = decay * I + (1 - decay) * mean_k |S_kn dL/dS_kn| (eq. 7 and 8),
    and of every matrix only a share p_t of its N outputs stays, those of largest I; the others are
    set to zero, and may come back while p_t falls. p_t is 1 for the first `warmup` steps, `left` in
    the last `settled`, and between them left + (1 - left) (1 - done)^3, `done` from 0 to 1.
    Shares are of whole channels, halves up; `left` = 0 takes all of S away.
    MC-SMoE (arXiv:2310.01334) compresses its merged experts so; its code ranks the channels of all
    matrices together, here every matrix keeps as many, so that the experts of a bank are alike.
    """

    left: float
    warmup: int
    settled: int
    optimizer: Optimizer = AdamW()
    decay: float = 0.85

    def check(self) -> None:
        check_that(0 <= self.left <= 1, self, "left", "Give a share from 0 (none) to 1 (all).")
        check_that(self.warmup >= 0, self, "warmup", "Give a number of steps.")
        check_that(self.settled >= 1, self, "settled", "The last step at least prunes to `left`.")
        check_that(0 <= self.decay < 1, self, "decay", "0.85 is usual.")

    def learning_rate(self, step: Any, steps: int) -> Array:
        """That of `optimizer`."""
        return self.optimizer.learning_rate(step, steps)

    def share(self, step: Any, steps: int) -> Array:
        """p_t after step t = 0 .. steps - 1, float32."""
        between = max(steps - self.settled - self.warmup, 1)
        done = jnp.clip((jnp.asarray(step, jnp.float32) + 1 - self.warmup) / between, 0, 1)
        falling = self.left + (1 - self.left) * (1 - done) ** 3
        return jnp.where(step >= steps - self.settled, self.left, falling)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        check_that(
            self.warmup + self.settled <= steps,
            self,
            "settled",
            f"warmup = {self.warmup} and settled are within the run's {steps} steps.",
        )
        inner = self.optimizer.transformation(steps)

        def init(params: Any) -> _Pruning:
            _require_pruned(params)
            # One per parameter, though only those of S are read: so a mesh knows where each lies.
            zeros = jax.tree.map(jnp.zeros_like, params)
            return _Pruning(inner.init(params), zeros, jnp.zeros((), jnp.int32))

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _Pruning]:
            stepped, memory = inner.update(updates, state.inner, params)
            changed, importance = dict(cast(Leaves, stepped)), dict(state.importance)
            share = self.share(state.step, steps)
            for name in filter(is_pruned, changed):
                after = params[name] + changed[name]
                seen = jnp.abs(after * updates[name])
                old = importance[name]
                importance[name] = self.decay * old + (1 - self.decay) * seen
                count = self._count(share, after.shape[-1])
                kept = _largest(importance[name].mean(-2), count)[..., None, :]
                changed[name] = jnp.where(kept, changed[name], -params[name])
            return changed, _Pruning(memory, importance, state.step + 1)

        return optax.GradientTransformation(init, update)

    def _count(self, share: Array, channels: int) -> Array:
        """How many of so many channels a share is, never fewer than are left in the end."""
        falling = jnp.floor(share * channels + 0.5).astype(jnp.int32)
        return jnp.maximum(falling, channels_left(self.left, channels))


class _Pruning(NamedTuple):
    """What an update remembers: of the optimizer inside, importances, steps taken."""

    inner: Any
    importance: Any
    step: Array


def is_pruned(name: str) -> bool:
    """Whether a leaf of `models.partition` is an S of w = u v + S."""
    return name.endswith(PRUNED)


def _require_pruned(leaves: Any) -> None:
    if isinstance(leaves, dict) and not any(map(is_pruned, leaves)):
        raise SpecError(
            f"PrunesChannels: no leaf that trains ends in {PRUNED}, none of {len(leaves)}.",
            "Put Factorise with LowRankAndRest before it, and let its S train.",
        )


def channels_left(left: float, channels: int) -> int:
    """How many of so many channels a share is: halves up."""
    return math.floor(left * channels + 0.5)


def _largest(values: Array, count: Array) -> Array:
    """bool: the `count` largest along the last axis, the lower index first among equals."""
    order = jnp.argsort(-values, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < count
