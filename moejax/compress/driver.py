"""The one-shot driver: statistics of the model as it is, a pass layer by layer, the next pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, ExpertCounts, GateMass, LayerStatistics, Statistics
from moejax.compress.accounting import stored_bytes, stored_code_bits
from moejax.compress.block_weights import block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit, OutsidePass, Pass, Weight
from moejax.compress.patterns import OUTSIDE, in_layer
from moejax.core import keys
from moejax.models import (
    Block,
    DecoderLM,
    LayerSpec,
    layers,
    parameters,
    with_layers,
    with_parameters,
)
from moejax.moe import MoESpec
from moejax.runs import Ledger, LedgerRow, Progress

StatisticsSource = Callable[[DecoderLM, tuple[Accumulator, ...]], Statistics]
"""Collects statistics of a model, on text that the caller has chosen."""

_LEDGER = (ExpertCounts(), GateMass())  # what the ledger says of an expert, whatever the pass


def compress(
    model: DecoderLM,
    recipe: Sequence[Pass],
    statistics: StatisticsSource,
    *,
    key: Array,
    arm: str,
    ledger: Ledger,
    dtype: Any = jnp.bfloat16,
    progress: Progress | None = None,
) -> DecoderLM:
    """The model after every pass of `recipe` in turn; the given model stays as it is.

    statistics: called before a pass for what it needs and nobody knows yet or no longer holds,
    together with what later passes can still use; so once for a recipe of one pass.
    ledger: gets a row per expert and matrix of each pass under the name `arm`, with layers and
    experts numbered as in the given model. dtype: in which plain arrays will be saved.
    progress: advances by one per pass and layer.
    """
    check_recipe(recipe, model)
    experts = [_numbered(layer) for layer in model.spec.layers]
    known: Statistics | None = None
    valid: set[Accumulator] = set()
    for number, step in enumerate(recipe):
        if not valid >= {*step.needs(), *_LEDGER}:
            missing = _wanted(recipe[number:], valid)
            fresh = statistics(model, missing)
            kept = known.only([a.name for a in valid]) if known and valid else None
            known = kept.joined(fresh) if kept else fresh
            valid.update(missing)
        assert known is not None
        plan, pass_key = step.decide(known, model.spec), keys.fold(key, number)
        rows = functools.partial(_Rows, arm, type(step).__name__, known.tokens, dtype)
        blocks = layers(model)
        for index, block in enumerate(blocks):
            found = known.layers[index]
            edit = step.apply_layer(index, block, plan, found, keys.fold(pass_key, index))
            blocks[index] = edit.block
            seen = {} if _behind_slots(block) else found
            ledger.add(rows(index, seen).of_layer(edit, experts[index]))
            if edit.experts is not None:
                experts[index] = [experts[index][e] for e in edit.experts]
            if progress is not None:
                progress.advance(1)
        model = with_layers(model, blocks)
        if isinstance(step, OutsidePass):
            named = {n: w for n, w in parameters(model).items() if in_layer(n)[0] == OUTSIDE}
            changed, edits = step.apply_outside(named, plan, keys.fold(pass_key, len(blocks)))
            outside = rows(OUTSIDE, {})
            ledger.add(outside.of_matrix(edit, None, changed[edit.matrix]) for edit in edits)
            if changed:
                model = with_parameters(model.spec, {**parameters(model), **changed})
        valid = {a for a in valid if not step.invalidates(a)}
    return model


def check_recipe(recipe: Sequence[Pass], model: DecoderLM) -> None:
    """Raises SpecError if a pass cannot treat what earlier ones make of this model.

    Nothing but shapes is computed.
    """
    graphdef, state = nnx.split(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    outlined = nnx.merge(graphdef, shapes)
    for step in recipe:
        outlined, _ = step.outline(outlined)


def _wanted(passes: Sequence[Pass], valid: set[Accumulator]) -> tuple[Accumulator, ...]:
    """What is not known yet of the model before the first of these passes, and holds until used."""
    needed = [
        accumulator
        for i, step in enumerate(passes)
        for accumulator in (*step.needs(), *_LEDGER)
        if not any(earlier.invalidates(accumulator) for earlier in passes[:i])
    ]
    return tuple(dict.fromkeys(a for a in needed if a not in valid))


class _Rows:
    """Ledger rows of one pass and layer: what the pass did, with what is known of every expert."""

    def __init__(
        self, arm: str, name: str, tokens: int, dtype: Any, layer: int, found: LayerStatistics
    ):
        self.arm, self.name, self.tokens, self.dtype = arm, name, tokens, dtype
        self.layer, self.found = layer, found

    def of_layer(self, edit: LayerEdit, experts: list[int]) -> list[LedgerRow]:
        """experts: the number in the first model of each expert before the edit."""
        after = block_weights(edit.block)
        places = range(len(experts)) if edit.experts is None else edit.experts
        place = {expert: i for i, expert in enumerate(places)}
        rows = []
        for matrix in edit.matrices:
            if matrix.expert is None:
                rows.append(self.of_matrix(matrix, None, after[matrix.matrix]))
                continue
            kept = matrix.expert in place
            weight = weights.take(after[matrix.matrix], place[matrix.expert]) if kept else None
            rows.append(self.of_matrix(matrix, experts[matrix.expert], weight))
        return rows

    def of_matrix(self, edit: MatrixEdit, number: int | None, weight: Weight | None) -> LedgerRow:
        """weight: of this expert alone, after the pass; None where it is gone."""
        tokens, mass = self._seen(edit.expert)
        return LedgerRow(
            arm=self.arm,
            pass_name=self.name,
            layer=self.layer,
            expert=number,
            matrix=edit.matrix,
            tokens=tokens,
            gate_mass=mass,
            code_bits=None if weight is None else stored_code_bits(weight, self.dtype),
            stored_bytes=0 if weight is None else stored_bytes(weight, self.dtype),
            relative_error=edit.relative_error,
            fallback=edit.fallback,
            dead=tokens == 0,
            calibrated=bool(tokens) and edit.calibrated,
            lineage=edit.lineage,
        )

    def _seen(self, expert: int | None) -> tuple[int | None, float | None]:
        """Tokens and gate mass; unknown for experts behind a slot map: statistics number others."""
        if expert is None:
            return self.tokens, None
        if ExpertCounts.name not in self.found:
            return None, None
        counts, mass = self.found[ExpertCounts.name], self.found[GateMass.name]
        return int(counts[expert]), float(mass[expert])


def _behind_slots(block: Block) -> bool:
    ffn = block.spec.ffn
    return isinstance(ffn, MoESpec) and ffn.slots is not None


def _numbered(layer: LayerSpec) -> list[int]:
    return list(range(layer.ffn.stored)) if isinstance(layer.ffn, MoESpec) else []
