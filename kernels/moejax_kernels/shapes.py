"""Shapes of real models' experts, at which every op is measured, compiled and tuned.

Widths, experts and experts per token are those of the published configurations. Each model has
two products: `gate`, D -> F (its twin `up` is the same shape), and `down`, F -> D. Group sizes are
drawn as a router draws them: every token chooses distinct experts, so that no group has more rows
than there are tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ZIPF = 1.0
"""The skew that `skewed` means everywhere: popularity of experts falls as 1 / rank."""


class Experts(NamedTuple):
    """The routed experts of one layer of a model: `experts` gated FFNs, `chosen` per token."""

    name: str
    width: int
    expert_width: int
    experts: int
    chosen: int

    def gate(self, tokens: int) -> Shape:
        """The product D -> F at `tokens` tokens."""
        name = f"{self.name}/{tokens}/gate"
        return Shape(name, tokens, self.chosen, self.width, self.expert_width, self.experts)

    def down(self, tokens: int) -> Shape:
        """The product F -> D at `tokens` tokens."""
        name = f"{self.name}/{tokens}/down"
        return Shape(name, tokens, self.chosen, self.expert_width, self.width, self.experts)


class Shape(NamedTuple):
    """One grouped matmul: `tokens * chosen` rows of `inputs` over `experts` [inputs, outputs]."""

    name: str
    tokens: int
    chosen: int
    inputs: int
    outputs: int
    experts: int

    @property
    def rows(self) -> int:
        """Rows of all groups together."""
        return self.tokens * self.chosen

    @property
    def flops(self) -> int:
        """Useful flops of the forward product."""
        return 2 * self.rows * self.inputs * self.outputs

    def group_sizes(self, skew: float, seed: int = 0) -> np.ndarray:
        """int32 [experts], sum = rows: how many tokens chose each expert; see `choices`."""
        chosen_TxK = self.choices(skew, seed)
        return np.bincount(chosen_TxK.ravel(), minlength=self.experts).astype(np.int32)

    def choices(self, skew: float, seed: int = 0) -> np.ndarray:
        """int [tokens, chosen]: every token chooses distinct experts at random.

        skew: experts are chosen with odds rank**-skew, ranks shuffled; 0 is balanced on average,
            `ZIPF` is skewed. Gumbel top-k draws without replacement (arXiv:1903.06059).
        """
        generator = np.random.default_rng(seed)
        log_odds_E = -skew * np.log(1.0 + generator.permutation(self.experts))
        noise_TxE = generator.gumbel(size=(self.tokens, self.experts))
        first_TxE = np.argpartition(-(log_odds_E + noise_TxE), self.chosen - 1, axis=1)
        return first_TxE[:, : self.chosen]


REFERENCE = Experts("reference", 256, 128, 16, 2)  # moejax's own reference model
OLMOE = Experts("olmoe", 2048, 1024, 64, 8)
MIXTRAL = Experts("mixtral", 4096, 14336, 8, 2)
QWEN = Experts("qwen1.5_moe", 2048, 1408, 60, 4)
DEEPSEEK = Experts("deepseek_v3", 7168, 2048, 256, 8)

MODELS = (OLMOE, MIXTRAL, QWEN, DEEPSEEK)
DECODE = (1, 8, 32)
PREFILL = (512, 4096)

SHAPES = tuple(
    product
    for model in (REFERENCE, *MODELS)
    for tokens in (*DECODE, *PREFILL)
    for product in (model.gate(tokens), model.down(tokens))
)
