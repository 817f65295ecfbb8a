"""Shapes of real models at which the op is measured.

Widths and experts are those of the published configurations; the rows are tokens times experts
per token. `gate` is the product D -> F; the `down` product F -> D has the same flops.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """One grouped matmul: `rows` rows of `inputs` over `experts` matrices [inputs, outputs]."""

    name: str
    rows: int
    inputs: int
    outputs: int
    experts: int

    @property
    def flops(self) -> int:
        """Useful flops of the forward product."""
        return 2 * self.rows * self.inputs * self.outputs

    def group_sizes(self, skew: float, seed: int = 0) -> np.ndarray:
        """int32 [E], sum = rows: shares fall as rank**-skew, shuffled; 0 is random balance."""
        generator = np.random.default_rng(seed)
        share = (1.0 + np.arange(self.experts)) ** -skew
        share = generator.permutation(share / share.sum())
        return generator.multinomial(self.rows, share).astype(np.int32)


REFERENCE = Shape("reference", 8192, 256, 128, 16)  # moejax's own reference model, 4096 tokens, K=2

SHAPES = (
    REFERENCE,
    Shape("reference_decode", 8, 256, 128, 16),
    Shape("olmoe", 4096, 2048, 1024, 64),  # 512 tokens, K=8
    Shape("olmoe_decode", 64, 2048, 1024, 64),
    Shape("qwen1.5_moe", 2048, 2048, 1408, 60),  # 512 tokens, K=4
    Shape("mixtral", 1024, 4096, 14336, 8),  # 512 tokens, K=2
    Shape("deepseek_v3", 4096, 7168, 2048, 256),  # 512 tokens, K=8
)
