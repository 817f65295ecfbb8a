"""Experts dropped by a search over subsets, more where layers matter less (MoE-I2, 2411.01016)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, LayerInputs, LayerStatistics, Statistics
from moejax.compress.block_weights import expert_matrices
from moejax.compress.expert_scores import ExpertScore
from moejax.compress.genetic import GeneticSearch, Subset
from moejax.compress.loss_scores import ModelScore
from moejax.compress.passes import LayerEdit, MatrixEdit
from moejax.compress.ranks import scored
from moejax.compress.subset_error import subset_errors
from moejax.compress.text_windows import spread
from moejax.core import SpecError, check_that, spec, taps
from moejax.models import Block, DecoderLM, ModelSpec, encode, layers, select_experts, with_layers
from moejax.moe import MoESpec
from moejax.runs.ledger import DROPPED

Plan = dict[int, Subset]  # layer -> experts that stay, ascending


@spec
class SearchedDrop:
    """MoE-I2's inter-expert pruning: how many experts by layer, then which ones by search.

    A layer's importance is the sum of its experts' scores. Of all experts a share `fraction` goes;
    the layers keep experts in proportion to importance^power, none more than it has or fewer than
    its router chooses. In a layer `search` finds the `candidates` subsets whose output, on `tokens`
    cached inputs, is nearest. Of `span` neighbouring layers with experts that combination of
    candidates is taken that changes the residual stream behind them least, on `windows` windows of
    the calibration text, layers before them whole ("block-wise KT-reception field").
    How the paper turns importance into counts was not at hand: the proportion is our reading.
    """

    fraction: float
    score: ExpertScore | ModelScore
    search: GeneticSearch = GeneticSearch()
    power: float = 1.0
    candidates: int = 3
    span: int = 3
    tokens: int = 512
    windows: int = 4

    def check(self) -> None:
        check_that(0 <= self.fraction < 1, self, "fraction", "Give a share from 0 to below 1.")
        check_that(self.power >= 0, self, "power", "Use 0 for equal counts, 1 for proportional.")
        for field in ("candidates", "span", "tokens", "windows"):
            check_that(getattr(self, field) >= 1, self, field, "Give 1 or more.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        """As if all layers mattered alike."""
        blocks, names = layers(model), []
        experts = self._experts(model.spec)
        for layer, kept in self._counts(model.spec, dict.fromkeys(experts, 1.0)).items():
            names += [f"layers.{layer}.{name}" for name in expert_matrices(blocks[layer])]
            select = functools.partial(select_experts, keep=range(kept))
            blocks[layer] = nnx.eval_shape(select, blocks[layer])
        return with_layers(model, blocks), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        asked = () if isinstance(self.score, ModelScore) else self.score.needs()
        return (*asked, LayerInputs(tokens=self.tokens))

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: indices change, and tokens go to other experts."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        experts = self._experts(model.spec)
        scores = scored(self.score, stats, model, list(experts))
        importance = {layer: float(np.maximum(s, 0).sum()) for layer, s in scores.items()}
        counts, blocks = self._counts(model.spec, importance), layers(model)
        found: dict[int, list[Subset]] = {}
        for layer, kept in counts.items():
            inputs_TxD = stats.layers[layer][LayerInputs(tokens=self.tokens).name]
            losses = functools.partial(subset_errors, blocks[layer], inputs_TxD, layer=layer)
            found[layer] = self.search(losses, experts[layer], kept, self.candidates, layer)
        plan: Plan = {}
        numbers = list(found)
        for first in range(0, len(numbers), self.span):
            group = numbers[first : first + self.span]
            plan |= self._together(model, {layer: found[layer] for layer in group}, stats)
        return plan

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        keep = plan[index]
        edits = tuple(
            MatrixEdit(name, expert, relative_error=0.0)
            if expert in keep
            else MatrixEdit(name, expert, lineage=(DROPPED,))
            for name in expert_matrices(block)
            for expert in range(_moe(block).experts)
        )
        return LayerEdit(select_experts(block, keep), edits, experts=keep)

    def _together(
        self, model: DecoderLM, found: dict[int, list[Subset]], stats: Statistics
    ) -> Plan:
        """The candidates of neighbouring layers that go best together."""
        choices = [
            dict(zip(found, subsets, strict=True)) for subsets in itertools.product(*found.values())
        ]
        if len(found) == 1 or len(choices) == 1:
            return choices[0]
        text = spread(stats.text, self.windows, type(self).__name__)
        errors = stream_errors(model, choices, text, max(found))
        return choices[int(np.argmin(errors))]

    def _experts(self, model: ModelSpec) -> dict[int, int]:
        found = {i: _moe(model.layers[i]).experts for i in model.moe_layers}
        fix = "Drop experts in an MoE model."
        if not found:
            raise SpecError("SearchedDrop: no layer of the model has experts.", fix)
        return found

    def _counts(self, model: ModelSpec, importance: dict[int, float]) -> dict[int, int]:
        """Layer -> how many experts stay; SpecError where fewer than k would have to."""
        most = self._experts(model)
        least = {i: getattr(_moe(model.layers[i]).router.selector, "k", 1) for i in most}
        wanted = sum(most.values()) - int(np.floor(self.fraction * sum(most.values()) + 0.5))
        if wanted < sum(least.values()):
            share = 1 - sum(least.values()) / sum(most.values())
            raise SpecError(
                f"SearchedDrop.fraction = {self.fraction} leaves {wanted} of {sum(most.values())} "
                f"experts, but the routers of layers {list(most)} choose {list(least.values())}.",
                f"Drop at most a fraction of {share:g}.",
                field="fraction",
            )
        weight = {i: max(value, 0.0) ** self.power for i, value in importance.items()}
        return shared_out(wanted, weight, least, most)


def shared_out(
    wanted: int, weight: dict[int, float], least: dict[int, int], most: dict[int, int]
) -> dict[int, int]:
    """Whole numbers between least and most that add up to `wanted`, near a proportion of weight.

    One by one from the least, always to the part that is furthest behind its weight (D'Hondt);
    parts without weight come last, equal ones in their order.
    """
    count = dict(least)
    while sum(count.values()) < wanted:
        open_ = [i for i in count if count[i] < most[i]]
        count[max(open_, key=lambda i: (weight[i] / (count[i] + 1), -count[i]))] += 1
    return count


def stream_errors(
    model: DecoderLM, choices: Sequence[Plan], text: Sequence[Any], behind: int
) -> list[float]:
    """||x - x[a choice of experts kept]||_F of the residual stream behind a layer, per choice."""
    blocks = layers(model)

    def stream(changed: list[Block]) -> list[np.ndarray]:
        graphdef, state = nnx.split(with_layers(model, changed))
        return [
            np.asarray(_stream(graphdef, state, b.tokens_BxS, b.mask_BxS, behind)) for b in text
        ]

    whole, errors = stream(blocks), []
    for choice in choices:
        kept = [select_experts(b, choice[i]) if i in choice else b for i, b in enumerate(blocks)]
        squares = [
            np.square(x - y)[np.asarray(b.mask_BxS)].sum(dtype=np.float64)
            for x, y, b in zip(stream(kept), whole, text, strict=True)
        ]
        errors.append(float(np.sqrt(sum(squares))))
    return errors


@functools.partial(jax.jit, static_argnames=("graphdef", "behind"))
def _stream(graphdef: Any, state: Any, tokens_BxS: Array, mask_BxS: Array, behind: int) -> Array:
    request = frozenset({taps.BLOCK_OUTPUT})
    model = nnx.merge(graphdef, state)
    return encode(model, tokens_BxS, mask_BxS=mask_BxS, request=request).taps[behind][
        taps.BLOCK_OUTPUT
    ]


def _moe(part: Any) -> MoESpec:
    """Of a layer's spec, or of a block."""
    ffn = part.spec.ffn if isinstance(part, Block) else part.ffn
    assert isinstance(ffn, MoESpec)
    return ffn
