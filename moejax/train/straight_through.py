"""Training of weights that are seen on a grid, whose rounding has no gradient of its own."""

from __future__ import annotations

from collections.abc import Callable

import jax

from moejax import weights
from moejax.models.partition import Leaves


def straight_through(
    leaves: Leaves, onto: Callable[[jax.Array], weights.Format], applies: Callable[[str], bool]
) -> Leaves:
    """The leaves as `onto` would store them, with the gradient of the leaves as they are.

    The straight-through estimator (arXiv:1308.3432): forward w_q, backward the identity. `applies`
    says which leaves, by name. As `train_step(through=...)` this trains behind frozen rounding; at
    the end `onto` gives what was trained for.
    """
    return {name: _through(leaf, onto) if applies(name) else leaf for name, leaf in leaves.items()}


def _through(leaf: jax.Array, onto: Callable[[jax.Array], weights.Format]) -> jax.Array:
    rounded = weights.materialize(onto(jax.lax.stop_gradient(leaf)), leaf.dtype)
    return leaf + jax.lax.stop_gradient(rounded - leaf)
