"""Layers that go: feed-forwards, mixers or whole blocks (arXiv:2406.02500, arXiv:2403.03853)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate import Accumulator, LayerInputs, LayerStatistics, Statistics, StreamCosine
from moejax.compress.block_weights import EXPERTS, block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit
from moejax.compress.patterns import BIAS
from moejax.core import SpecError, check_that, spec, taps
from moejax.models import (
    Block,
    DecoderLM,
    LayerSpec,
    ModelSpec,
    emptied,
    layers,
    with_layers,
    without_ffn,
    without_mixer,
)
from moejax.moe import MoESpec
from moejax.runs.ledger import DROPPED

Plan = frozenset[int]
TABLES = ("moe.slots.", "moe.rules.", EXPERTS)  # what has no row of its own in a ledger


@runtime_checkable
class Part(Protocol):
    """What of a layer goes; a frozen spec.

    before, after: the places of the residual stream between which it stands.
    """

    @property
    def before(self) -> str: ...

    @property
    def after(self) -> str: ...

    def has(self, layer: LayerSpec) -> bool:
        """Whether the layer has the part, and can do without."""
        ...

    def without(self, block: Block) -> Block: ...


@spec
class RoutedLayer:
    """The routed experts with router and norms: layer drop."""

    before = taps.MIXER_OUTPUT
    after = taps.BLOCK_OUTPUT

    def has(self, layer: LayerSpec) -> bool:
        return isinstance(layer.ffn, MoESpec) and layer.dense_residual is None

    def without(self, block: Block) -> Block:
        return without_ffn(block)


@spec
class MixerLayer:
    """The mixer with its norms: attention drop (arXiv:2406.15786)."""

    before = taps.BLOCK_INPUT
    after = taps.MIXER_OUTPUT

    def has(self, layer: LayerSpec) -> bool:
        return layer.mixer is not None

    def without(self, block: Block) -> Block:
        return without_mixer(block)


@spec
class WholeBlock:
    """Mixer and feed-forward: block drop, the layers of ShortGPT."""

    before = taps.BLOCK_INPUT
    after = taps.BLOCK_OUTPUT

    def has(self, layer: LayerSpec) -> bool:
        return layer.mixer is not None or layer.ffn is not None

    def without(self, block: Block) -> Block:
        return emptied(block)


@runtime_checkable
class LayerChoice(Protocol):
    """Which of the layers that have a part lose it; a frozen spec."""

    def needs(self, part: Part) -> tuple[Accumulator, ...]: ...

    def __call__(
        self, part: Part, candidates: Sequence[int], count: int, stats: Statistics
    ) -> frozenset[int]: ...

    def outline(self, part: Part, candidates: Sequence[int], count: int) -> frozenset[int]:
        """Some choice it might make, told from shapes alone; SpecError where it has none."""
        ...


@spec
class MostSimilar:
    """The parts that leave the residual stream most similar, by mean cosine over tokens.

    The lower layer first among equals. 1 - cosine is ShortGPT's block influence.
    """

    def needs(self, part: Part) -> tuple[Accumulator, ...]:
        return (StreamCosine(before=part.before, after=part.after),)

    def __call__(
        self, part: Part, candidates: Sequence[int], count: int, stats: Statistics
    ) -> frozenset[int]:
        (cosine,) = self.needs(part)
        similar = np.asarray([float(stats.of(layer, cosine)) for layer in candidates])
        order = np.argsort(-similar, kind="stable")[:count]
        return frozenset(candidates[i] for i in order)

    def outline(self, part: Part, candidates: Sequence[int], count: int) -> frozenset[int]:
        return frozenset(candidates[:count])


@spec
class Consecutive:
    """Neighbours, where the stream is most similar before the first and after the last of them.

    Mean cosine over a sample of `tokens` tokens, the lower layers first among equals. The released
    code of arXiv:2406.02500 scores a window one block longer than what it drops; this one does not.
    """

    tokens: int = 2048

    def check(self) -> None:
        check_that(self.tokens >= 1, self, "tokens", "2048 tokens are usual.")

    def needs(self, part: Part) -> tuple[Accumulator, ...]:
        sample = functools.partial(LayerInputs, tokens=self.tokens)
        return (sample(tap=part.before), sample(tap=part.after))

    def __call__(
        self, part: Part, candidates: Sequence[int], count: int, stats: Statistics
    ) -> frozenset[int]:
        before, after = self.needs(part)
        windows = _windows(candidates, count)
        cosine = [
            _cosine(stats.of(window[0], before), stats.of(window[-1], after)) for window in windows
        ]
        return frozenset(windows[int(np.argmax(cosine))])

    def outline(self, part: Part, candidates: Sequence[int], count: int) -> frozenset[int]:
        windows = _windows(candidates, count)
        if not windows:
            raise SpecError(
                f"there are no {count} neighbouring layers with a {type(part).__name__}: "
                f"those with one are {', '.join(map(str, candidates))}.",
                "Drop fewer, or choose MostSimilar().",
                field="count",
            )
        return frozenset(windows[0])


@spec
class RandomLayers:
    """Layers drawn at random: the control that a choice has to beat."""

    seed: int = 0

    def check(self) -> None:
        """Seeds count from 0."""
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def needs(self, part: Part) -> tuple[Accumulator, ...]:
        return ()

    def __call__(
        self, part: Part, candidates: Sequence[int], count: int, stats: Statistics
    ) -> frozenset[int]:
        return self.outline(part, candidates, count)

    def outline(self, part: Part, candidates: Sequence[int], count: int) -> frozenset[int]:
        draws = np.random.default_rng(self.seed)
        return frozenset(draws.choice(candidates, count, replace=False).tolist())


@spec
class LayerDrop:
    """Takes `part` out of `count` layers, which keep their numbers (arXiv:2406.02500).

    Its Layer Drop is the default, its Block Drop `part=WholeBlock()`, discrete with `MostSimilar`
    or of neighbours with `Consecutive`; ShortGPT (arXiv:2403.03853) is the discrete one.
    SpecError where fewer layers have the part, or layers above read what a dropped mixer writes.
    """

    count: int
    part: Part = RoutedLayer()
    choice: LayerChoice = MostSimilar()

    def check(self) -> None:
        check_that(self.count >= 0, self, "count", "Use 0 to drop none.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        chosen = self._chosen(model.spec, self.choice.outline)
        blocks, names = layers(model), []
        for layer in sorted(chosen):
            before = blocks[layer]
            blocks[layer] = nnx.eval_shape(self.part.without, before)
            gone = set(block_weights(before)) - set(block_weights(blocks[layer]))
            names += [f"layers.{layer}.{name}" for name in sorted(gone)]
        return with_layers(model, blocks), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.choice.needs(self.part) if self.count else ()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: later layers get other inputs."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        return self._chosen(model.spec, functools.partial(self.choice, stats=stats))

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        after = self.part.without(block)
        left, edits = block_weights(after), []
        gone = {name: w for name, w in block_weights(block).items() if name not in left}
        for name, w in gone.items():
            if name.startswith(EXPERTS) and not name.endswith(BIAS):
                stored = range(w.shape[0])
                edits += [MatrixEdit(name, expert, lineage=(DROPPED,)) for expert in stored]
            elif len(w.shape) == 2 and not name.startswith(TABLES):
                edits.append(MatrixEdit(name, None, lineage=(DROPPED,)))
        experts = () if any(name.startswith(EXPERTS) for name in gone) else None
        return LayerEdit(after, tuple(edits), experts=experts)

    def _chosen(self, model: ModelSpec, choose: Callable[..., frozenset[int]]) -> Plan:
        candidates = [i for i, layer in enumerate(model.layers) if self.part.has(layer)]
        name = type(self.part).__name__
        if self.count > len(candidates):
            raise SpecError(
                f"LayerDrop.count = {self.count}, but {len(candidates)} layers have a {name}.",
                f"Drop at most {len(candidates)}.",
                field="count",
            )
        if not self.count:
            return frozenset()
        free = candidates
        if self.part.before == taps.BLOCK_INPUT:  # a mixer that layers above read cannot go
            free = [i for i in free if not model.layers[i].writes & model.carried_into(i + 1)]
        if self.count > len(free):
            raise SpecError(
                f"LayerDrop.count = {self.count}, but layers above read what the mixers of all but "
                f"{len(free)} layers write.",
                f"Drop at most {len(free)}.",
                field="count",
            )
        return choose(self.part, free, self.count)


def _windows(candidates: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Runs of `count` neighbours among the candidates."""
    known = set(candidates)
    runs = (tuple(range(first, first + count)) for first in candidates)
    return [run for run in runs if known >= set(run)]


def _cosine(a_TxD: np.ndarray, b_TxD: np.ndarray) -> float:
    a, b = np.asarray(a_TxD, np.float64), np.asarray(b_TxD, np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)))
