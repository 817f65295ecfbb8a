"""How much the loss of the whole model grows without one expert (MoE-I2, arXiv:2411.01016)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax import models
from moejax.calibrate import Statistics
from moejax.compress.text_windows import spread
from moejax.core import SpecError, check_that, spec
from moejax.models import DecoderLM, layers, select_experts, with_layers
from moejax.moe import MoESpec


@runtime_checkable
class ModelScore(Protocol):
    """A number per expert, found on the whole model; experts of low score go first."""

    def of_model(
        self, stats: Statistics, model: DecoderLM, chosen: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Layer -> float64 [E], for the layers chosen."""
        ...


@spec
class LossIncrease:
    """Mean negative log-likelihood without the expert, less that of the model (MoE-I2, eq. 1).

    One expert of one layer at a time; its tokens are rerouted. It may be negative.
    windows: how many windows of the calibration text are read, spread evenly over it; each expert
    takes a pass over them.
    """

    windows: int = 8

    def check(self) -> None:
        check_that(self.windows >= 1, self, "windows", "Read at least one window.")

    def of_model(
        self, stats: Statistics, model: DecoderLM, chosen: Sequence[int]
    ) -> dict[int, np.ndarray]:
        text = spread(stats.text, self.windows, "LossIncrease")
        whole = mean_loss(model, text)
        blocks, found = layers(model), {}
        for layer in chosen:
            ffn = blocks[layer].spec.ffn
            assert isinstance(ffn, MoESpec)
            if ffn.experts <= getattr(ffn.router.selector, "k", 1):
                raise SpecError(
                    f"LossIncrease cannot spare one of {ffn.experts} experts in layer {layer}: "
                    "its router chooses as many.",
                    "Score experts where more are left than chosen.",
                )
            found[layer] = np.zeros(ffn.experts)
            for e in range(ffn.experts):
                kept = [other for other in range(ffn.experts) if other != e]
                without = list(blocks)
                without[layer] = select_experts(blocks[layer], kept)
                found[layer][e] = mean_loss(with_layers(model, without), text) - whole
        return found


def mean_loss(model: DecoderLM, text: Sequence[Any]) -> float:
    """Mean negative log-likelihood, nats per token."""
    graphdef, state = nnx.split(model)
    sums = [_nll(graphdef, state, b.tokens_BxS, b.targets_BxS, b.mask_BxS) for b in text]
    return float(sum(sums)) / sum(int(b.mask_BxS.sum()) for b in text)


@functools.partial(jax.jit, static_argnames="graphdef")
def _nll(
    graphdef: Any, state: Any, tokens_BxS: Array, targets_BxS: Array, mask_BxS: Array
) -> Array:
    model = nnx.merge(graphdef, state)
    output = models.forward(model, tokens_BxS, mask_BxS=mask_BxS)
    log_p_BxSxV = jax.nn.log_softmax(output.logits_BxSxV, axis=-1)
    nll_BxS = -jnp.take_along_axis(log_p_BxSxV, targets_BxS[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask_BxS, nll_BxS, 0))
