"""Texts that a student writes itself, in the place of given ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import check_that, keys, spec
from moejax.models import DecoderLM, Sample, Structure, combine, generate
from moejax.models.partition import Leaves
from moejax.train.step import Step, StepMetrics, TrainState


@spec
class OnPolicy:
    """A share of each batch's rows goes on as the student writes it (GKD, arXiv:2306.13649).

    The first `prompt` tokens of such a row are kept, the rest are drawn by the student as it is at
    that step, and count as given: no gradient flows through the draw. Which rows, and what is
    drawn, depends on the step alone, so that a resumed run draws the same.
    """

    share: float = 1.0
    prompt: int = 16
    sampler: Sample = Sample()
    seed: int = 0

    def check(self) -> None:
        check_that(0 < self.share <= 1, self, "share", "Above 0 and at most 1.")
        check_that(self.prompt >= 1, self, "prompt", "Keep at least one token.")

    def __call__(
        self,
        structure: Structure,
        step: Step,
        through: Callable[[Leaves], Leaves] = lambda trainable: trainable,
    ) -> Step:
        """The step on what `tokens_BxS1` became; through: as `train_step` was given."""

        def on_own(state: TrainState, tokens_BxS1: Any) -> tuple[TrainState, StepMetrics]:
            student = combine(structure, through(state.trainable), state.frozen)
            return step(state, self.written(student, int(state.step), tokens_BxS1))

        return on_own

    def written(self, student: DecoderLM, number: int, tokens_BxS1: Any) -> np.ndarray:
        """The batch of step `number` with the student's own words in the rows that are drawn."""
        given = np.asarray(tokens_BxS1)
        own_B = np.random.default_rng((self.seed, number)).random(len(given)) < self.share
        new = given.shape[1] - self.prompt
        if not own_B.any() or new <= 0:
            return given
        key = keys.fold(jax.random.key(self.seed), number)
        prompt = jnp.asarray(given[:, : self.prompt])
        drawn = generate(student, prompt, new, sampler=self.sampler, key=key)
        own_BxS1 = np.concatenate([given[:, : self.prompt], np.asarray(drawn)], axis=1)
        return np.where(own_B[:, None], own_BxS1, given).astype(np.int32)
