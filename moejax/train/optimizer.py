"""Optimizers: what turns gradients into updates, and the learning rate of every step."""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import optax
from jax import Array

from moejax.core import check_that, spec


@runtime_checkable
class Optimizer(Protocol):
    """Builds an optax transformation for a run of `steps` steps."""

    def learning_rate(self, step: Any, steps: int) -> Array: ...

    def transformation(self, steps: int) -> optax.GradientTransformation: ...


@spec
class AdamW:
    """AdamW after clipping, with linear warm-up and a cosine (arXiv:1711.05101, arXiv:1608.03983).

    Step t = 0, 1, ... runs at `peak_learning_rate` * (t + 1) / `warmup` until the peak, then on a
    cosine to `final_fraction` of it at the end of the run. Gradients are clipped to a global norm
    of `clip_norm`. Weight decay acts on matrices only, embedding and router kernel included.
    """

    peak_learning_rate: float = 3e-3
    warmup: int = 60
    final_fraction: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def check(self) -> None:
        check_that(self.peak_learning_rate > 0, self, "peak_learning_rate", "Try 3e-3.")
        check_that(self.warmup >= 0, self, "warmup", "Give a number of steps; 0 for no warm-up.")
        check_that(0 <= self.final_fraction <= 1, self, "final_fraction", "Choose from 0 to 1.")
        check_that(0 <= self.beta1 < 1, self, "beta1", "Choose from 0 to below 1; try 0.9.")
        check_that(0 <= self.beta2 < 1, self, "beta2", "Choose from 0 to below 1; try 0.95.")
        check_that(self.epsilon > 0, self, "epsilon", "Try 1e-8.")
        check_that(self.weight_decay >= 0, self, "weight_decay", "Use 0 for none.")
        check_that(self.clip_norm > 0, self, "clip_norm", "Try 1.0.")

    def learning_rate(self, step: Any, steps: int) -> Array:
        """The learning rate of step 0 .. steps - 1, float32."""
        t = jnp.asarray(step, jnp.float32)
        done = jnp.clip((t - self.warmup) / max(steps - 1 - self.warmup, 1), 0, 1)
        cosine = self.final_fraction + (1 - self.final_fraction) * (1 + jnp.cos(jnp.pi * done)) / 2
        return self.peak_learning_rate * jnp.where(
            t < self.warmup, (t + 1) / max(self.warmup, 1), cosine
        )

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The update rule for leaves by name, as `models.partition` gives them."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                functools.partial(self.learning_rate, steps=steps),
                b1=self.beta1,
                b2=self.beta2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
                mask=_matrices,
            ),
        )


def _matrices(leaves: Any) -> dict[str, bool]:
    return {name: is_matrix(name, leaf) for name, leaf in leaves.items()}


def is_matrix(name: str, leaf: Array) -> bool:
    """Whether a leaf of `models.partition` is a matrix or a stack of them, no scale and no bias.

    A run of layers stacks its leaves in front, so that a vector [D] of a layer is [L, D] there, and
    the biases [E, N] of a bank of experts are [L, E, N].
    """
    return leaf.ndim - name.startswith("runs.") >= 2 and not name.endswith("bias")
