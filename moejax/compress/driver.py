"""Drivers: statistics of the model as it is, or layer by layer as it is compressed."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.calibrate import (
    Accumulator,
    ExpertCounts,
    GateMass,
    LayerStatistics,
    LayerStream,
    Statistics,
)
from moejax.compress.ledger_rows import Lineage, Rows
from moejax.compress.passes import LayerEdit, OutsidePass, Pass, Stage
from moejax.compress.patterns import OUTSIDE, in_layer
from moejax.core import SpecError, keys, spec
from moejax.models import Block, DecoderLM, layers, parameters, with_layers, with_parameters
from moejax.runs import Ledger, Progress

_LEDGER = (ExpertCounts(), GateMass())  # what the ledger says of an expert, whatever the pass


class StatisticsSource(Protocol):
    """Statistics of a model, on text that the caller has chosen: a `calibrate.Calibration`."""

    def __call__(
        self, model: DecoderLM, accumulators: tuple[Accumulator, ...], /
    ) -> Statistics: ...

    def stream(self, model: DecoderLM, /) -> LayerStream: ...


@spec
class Sequential:
    """Runs a pass layer by layer on statistics of what the compressed layers before give.

    GPTQ and QMoE calibrate so: a layer makes good what earlier ones lost. What the pass decides on
    the whole model, it decides on statistics of the model before any layer changed.
    """

    step: Pass

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        """That of the pass."""
        return self.step.outline(model)


Step = Pass | Sequential | Stage


def compress(
    model: DecoderLM,
    recipe: Sequence[Step],
    statistics: StatisticsSource,
    *,
    key: Array,
    arm: str,
    ledger: Ledger,
    dtype: Any = jnp.bfloat16,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> DecoderLM:
    """The model after every pass of `recipe` in turn; the given model stays as it is.

    statistics: called before a pass for what it needs and nobody knows yet or no longer holds,
    together with what later passes can still use; so once for a recipe of one pass. A pass under
    `Sequential` streams the text through the layers instead.
    ledger: gets a row per expert and matrix of each pass under the name `arm`, with layers and
    experts numbered as in the given model. dtype: in which plain arrays will be saved.
    progress: advances by one per pass and layer. folder: in which stages such as a recovery keep
    what they write, a folder per step; a temporary one where it is None.
    """
    original = model
    check_recipe(recipe, model)
    lineages = [Lineage.of(layer) for layer in model.spec.layers]
    known = Statistics.nothing(len(model.spec.layers))
    valid: set[Accumulator] = set()
    for number, step in enumerate(recipe):
        if isinstance(step, Stage):
            with _place(folder, number) as place:
                model = step.run(model, original, place)
            valid = set()
            continue
        found = _asked(step, model)
        if not valid >= set(found):
            missing = _wanted(recipe[number:], valid, model)
            fresh = statistics(model, missing)
            known = known.only([a.name for a in valid]).joined(fresh) if valid else fresh
            valid.update(missing)
        inner = step.step if isinstance(step, Sequential) else step
        plan, pass_key = inner.decide(known, model), keys.fold(key, number)
        treat = functools.partial(_treat, inner, plan, pass_key)
        rows = functools.partial(Rows, arm, type(inner).__name__, dtype)
        blocks: list[Block] = []
        with _layer_statistics(step, model, known, statistics) as source:
            for index, block in enumerate(layers(model)):
                stats = source.of(index, block)
                edit = treat(index, block, stats)
                blocks.append(edit.block)
                source.went(edit.block)
                ledger.add(rows(index, source.tokens, stats).of_layer(block, edit, lineages[index]))
                if progress is not None:
                    progress.advance(1)
            tokens = source.tokens
        model = with_layers(model, blocks)
        if isinstance(inner, OutsidePass):
            named = {n: w for n, w in parameters(model).items() if in_layer(n)[0] == OUTSIDE}
            changed, edits = inner.apply_outside(named, plan, keys.fold(pass_key, len(blocks)))
            outside = rows(OUTSIDE, tokens, {})
            ledger.add(outside.of_matrix(edit, None, changed[edit.matrix]) for edit in edits)
            if changed:
                model = with_parameters(model.spec, {**parameters(model), **changed})
        valid = {a for a in valid if not inner.invalidates(a)}
    return model


def check_recipe(recipe: Sequence[Step], model: DecoderLM) -> None:
    """Raises SpecError if a pass cannot treat what earlier ones make of this model.

    Nothing but shapes is computed.
    """
    graphdef, state = nnx.split(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    outlined = nnx.merge(graphdef, shapes)
    for number, step in enumerate(recipe, 1):
        try:
            if isinstance(step, Stage):
                step.compares(outlined.spec, model.spec)
            outlined, _ = step.outline(outlined)
        except SpecError as error:
            if len(recipe) == 1:
                raise
            where = f"step {number} of the recipe, {type(step).__name__}: "
            raise SpecError(where + error.problem, error.fix, field=error.field) from error


def _treat(
    step: Pass, plan: Any, key: Array, index: int, block: Block, stats: LayerStatistics
) -> LayerEdit:
    return step.apply_layer(index, block, plan, stats, keys.fold(key, index))


@contextlib.contextmanager
def _place(folder: Path | None, number: int) -> Iterator[Path]:
    """A folder for a stage."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place)
        return
    place = folder / str(number)
    place.mkdir(parents=True, exist_ok=True)
    yield place


def _asked(step: Step, model: DecoderLM) -> tuple[Accumulator, ...]:
    """What must be known of the whole model before a pass."""
    if isinstance(step, Stage):
        return ()
    if isinstance(step, Sequential):
        return step.step.needs(model.spec)
    return (*step.needs(model.spec), *step.layer_needs(model.spec), *_LEDGER)


def _wanted(
    passes: Sequence[Step], valid: set[Accumulator], model: DecoderLM
) -> tuple[Accumulator, ...]:
    """What is not known yet of the model before the first of these passes, and holds until used."""
    until = next((i for i, step in enumerate(passes) if isinstance(step, Stage)), len(passes))
    inner = [step.step if isinstance(step, Sequential) else step for step in passes[:until]]
    needed = [
        accumulator
        for i, step in enumerate(passes[:until])
        for accumulator in _asked(step, model)
        if not any(
            earlier.invalidates(accumulator)
            for earlier in inner[:i]
            if not isinstance(earlier, Stage)
        )
    ]
    return tuple(dict.fromkeys(a for a in needed if a not in valid))


class _Known:
    """Statistics of every layer, collected before the first of them changed."""

    def __init__(self, known: Statistics):
        self.tokens, self._known = known.tokens, known

    def of(self, index: int, block: Block) -> LayerStatistics:
        return self._known.layers[index]

    def went(self, block: Block) -> None:
        pass


class _Streamed:
    """Statistics of a layer on what the layers before it, compressed, make of the text."""

    def __init__(self, stream: LayerStream, accumulators: tuple[Accumulator, ...]):
        self.tokens, self._stream, self._accumulators = stream.tokens, stream, accumulators

    def of(self, index: int, block: Block) -> LayerStatistics:
        return self._stream.collect(block, self._accumulators)

    def went(self, block: Block) -> None:
        self._stream.advance(block)


@contextlib.contextmanager
def _layer_statistics(
    step: Step, model: DecoderLM, known: Statistics, source: StatisticsSource
) -> Iterator[_Known | _Streamed]:
    if not isinstance(step, Sequential):
        yield _Known(known)
        return
    accumulators = tuple(dict.fromkeys((*step.step.layer_needs(model.spec), *_LEDGER)))
    with source.stream(model) as stream:
        yield _Streamed(stream, accumulators)
