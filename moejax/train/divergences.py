"""How far a student's distribution is from its teacher's: forward, reverse, Jensen-Shannon."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core import check_that, spec


@runtime_checkable
class Divergence(Protocol):
    """D(P, Q) in nats for each row of logits [..., V] of teacher P and student Q: float32 [...]."""

    def __call__(self, teacher: Array, student: Array) -> Array: ...


@spec
class ForwardKL:
    """KL(P || Q): the student covers all that the teacher finds possible (arXiv:1503.02531)."""

    def __call__(self, teacher: Array, student: Array) -> Array:
        return _kl(_log(teacher), _log(student))


@spec
class ReverseKL:
    """KL(Q || P): the student keeps to what the teacher finds likely (arXiv:2306.08543)."""

    def __call__(self, teacher: Array, student: Array) -> Array:
        return _kl(_log(student), _log(teacher))


@spec
class JensenShannon:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q (arXiv:2306.13649, eq. 1).

    Its gradient over beta is that of KL(P || Q) as beta goes to 0, and of KL(Q || P) over 1 - beta
    as it goes to 1; 1/2 is symmetric.
    """

    beta: float = 0.5

    def check(self) -> None:
        inside = 0 < self.beta < 1
        check_that(inside, self, "beta", "Between 0 and 1; use ForwardKL or ReverseKL at the ends.")

    def __call__(self, teacher: Array, student: Array) -> Array:
        p, q = _log(teacher), _log(student)
        middle = jnp.logaddexp(p + jnp.log(self.beta), q + jnp.log1p(-self.beta))
        return self.beta * _kl(p, middle) + (1 - self.beta) * _kl(q, middle)


def _log(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _kl(p: Array, q: Array) -> Array:
    """Of log probabilities."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
