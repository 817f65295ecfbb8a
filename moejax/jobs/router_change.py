"""How much fine-tuning changed the router's rows: a score of experts."""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np

from moejax.calibrate import Accumulator, LayerStatistics
from moejax.compress.block_weights import block_weights
from moejax.compress.patterns import in_layer
from moejax.core import SpecError, spec
from moejax.jobs.model_source import ModelSource
from moejax.models import Block, parameters
from moejax.moe import LinearScores, MoESpec
from moejax.weights import materialize

STORED = jnp.bfloat16  # in which a study takes its models, fine-tuned or not
KERNEL = "moe.router.scores.kernel"


@spec
class RouterChange:
    """What the expert's router row changed from the model `before`: PEMPE (arXiv:2405.16646).

    of: "norm" for the growth of its l2 norm, "row" for the norm of its change. Experts whose row
    changed least go first. SpecError where a layer has other experts than in `before`, or a router
    whose logits are no products with one row per expert.
    """

    before: ModelSource
    of: Literal["norm", "row"] = "norm"

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def __call__(self, layer: int, block: Block, stats: LayerStatistics) -> np.ndarray:
        moe = block.spec.ffn
        old = _routers(self.before, self.before.manifest().sha256).get(layer)
        linear = isinstance(moe, MoESpec) and isinstance(moe.router.scores, LinearScores)
        kernel = materialize(block_weights(block)[KERNEL]) if linear else None
        if kernel is None or old is None or kernel.shape != old.shape:
            mine, theirs = ("none" if k is None else k.shape[1] for k in (kernel, old))
            raise SpecError(
                f"RouterChange: the router of layer {layer} has {mine} rows of single experts, "
                f"that of {self.before.path} has {theirs}.",
                "Score a fine-tuned model before any expert goes, against the one it began as.",
                field="before",
            )
        now_DxE = np.asarray(kernel, np.float64)
        if self.of == "row":
            return np.linalg.norm(now_DxE - old, axis=0)
        return np.linalg.norm(now_DxE, axis=0) - np.linalg.norm(old, axis=0)


@functools.lru_cache(maxsize=2)
def _routers(before: ModelSource, sha256: str) -> dict[int, np.ndarray]:
    """Layer -> the kernel of its router, float64 [D, E], where it is linear.

    sha256: of the model, so that another one in the same place is not taken for it.
    """
    named = parameters(before.load(STORED))
    kernels = {in_layer(name)[0]: w for name, w in named.items() if name.endswith("." + KERNEL)}
    return {layer: np.asarray(materialize(w), np.float64) for layer, w in kernels.items()}
