"""Input channels that come back after quantization: MoQa's patch for a new text (2503.21135)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, ByGroup, LayerStatistics, SecondMoments, Statistics
from moejax.compress.block_weights import block_weights, expert_matrices, with_block_weights
from moejax.compress.methods import INPUT_TAPS
from moejax.compress.passes import LayerEdit, MatrixEdit, OutsidePass, Pass, Weight
from moejax.core import DataError, SpecError, check_that, spec
from moejax.models import Block, DecoderLM, ModelSpec, layers, with_layers
from moejax.weights import Buckets, Format


class Ranking(NamedTuple):
    """How much each input channel of each expert's matrix counts, the most first to come back.

    score_ExK: float64; known_E: whether what the selection asks of the text was found.
    """

    score_ExK: np.ndarray
    known_E: np.ndarray


@runtime_checkable
class ChannelSelection(Protocol):
    """Which input channels come back; a frozen spec."""

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        """The statistics it reads for a matrix ("moe.experts.up")."""
        ...

    def __call__(
        self,
        layer: int,
        matrix: str,
        error_ExK: np.ndarray,
        stats: LayerStatistics,
        experts_E: np.ndarray,
    ) -> Ranking:
        """error_ExK: ||W_j - Q(W)_j||^2; experts_E: where `stats` have the expert of each row."""
        ...


@spec
class BySensitivity:
    """||X_j||^2 ||W_j - Q(W)_j||^2: what a channel adds to the squared error of the outputs, the
    other channels left out (MoQa, arXiv:2503.21135).

    X: the rows that each expert sees of `group`'s part of the calibration text, None for all of
    it. An expert that sees none has its channels ranked by their weights' error alone.
    """

    group: str | None = None

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return (self._moments(matrix),)

    def __call__(
        self,
        layer: int,
        matrix: str,
        error_ExK: np.ndarray,
        stats: LayerStatistics,
        experts_E: np.ndarray,
    ) -> Ranking:
        moments = stats[self._moments(matrix).name]
        moments_ExKxK = moments if self.group is None else moments[0]
        energy_ExK = np.einsum("ekk->ek", moments_ExKxK).astype(np.float64)
        if self.group is not None and not energy_ExK.any():
            raise DataError(
                f"BySensitivity.group = {self.group!r}, of which no text was seen.",
                "Calibrate on text of that group, or choose group = None.",
            )
        energy_ExK = energy_ExK[experts_E]
        known_E = energy_ExK.any(1)
        return Ranking(np.where(known_E[:, None], energy_ExK, 1) * error_ExK, known_E)

    def _moments(self, matrix: str) -> SecondMoments | ByGroup:
        moments = SecondMoments(tap=INPUT_TAPS[matrix])
        return moments if self.group is None else ByGroup(of=moments, groups=(self.group,))


@spec
class RandomChannels:
    """Channels drawn for every matrix: the control that a ranking has to beat."""

    seed: int = 0

    def check(self) -> None:
        """Seeds count from 0."""
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return ()

    def __call__(
        self,
        layer: int,
        matrix: str,
        error_ExK: np.ndarray,
        stats: LayerStatistics,
        experts_E: np.ndarray,
    ) -> Ranking:
        draws = np.random.default_rng((self.seed, layer, *matrix.encode()))
        return Ranking(draws.random(error_ExK.shape), np.full(len(error_ExK), True))


@spec
class ChannelPatch:
    """Runs a pass that quantizes experts, and gives the input channels that it hurt most their
    weights back in bfloat16 (MoQa, arXiv:2503.21135).

    Every expert matrix that `step` put in a format becomes a `weights.RowPatch` of it, inside
    `Buckets` bucket by bucket; matrices that it left plain stay so. The quantized weights stay as
    well, so that the patch is a table that can be added for one text and taken away again.
    share: of a matrix's input channels, rounded, at least one; each costs 2 N + 2 bytes.
    SpecError where `step` quantizes no expert.
    """

    step: Pass
    share: float = 0.02
    selection: ChannelSelection = BySensitivity()

    def check(self) -> None:
        check_that(0 < self.share <= 1, self, "share", "Use a share above 0, up to 1 for all.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        inner, names = self.step.outline(model)
        blocks, patched = layers(inner), False
        for index, (before, after) in enumerate(zip(layers(model), blocks, strict=True)):
            matrices = _quantized(before, after)
            patched = patched or bool(matrices)
            blocks[index] = with_block_weights(after, {m: self._shapes(after, m) for m in matrices})
        if not patched:
            raise SpecError(
                f"ChannelPatch.step = {type(self.step).__name__} quantizes no expert.",
                "Give it a step that does, such as Quantize or MixedPrecision.",
                field="step",
            )
        return with_layers(inner, blocks), names

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.step.needs(model)

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        matrices = ("moe.experts.gate", "moe.experts.up", "moe.experts.down")
        own = (a for matrix in matrices for a in self.selection.needs(matrix))
        return tuple(dict.fromkeys((*self.step.layer_needs(model), *own)))

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything, as other weights do."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Any:
        return self.step.decide(stats, model)

    def apply_layer(
        self, index: int, block: Block, plan: Any, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        edit = self.step.apply_layer(index, block, plan, stats, key)
        originals, now = block_weights(block), block_weights(edit.block)
        changed: dict[str, Weight] = {}
        rows = list(edit.matrices)
        for matrix in _quantized(block, edit.block):
            kept = range(now[matrix].shape[0]) if edit.experts is None else edit.experts
            experts_E = np.asarray(kept)
            w = originals[matrix][experts_E]
            error_ExK = np.asarray(_row_errors(w, now[matrix]), np.float64)
            ranking = self.selection(index, matrix, error_ExK, stats, experts_E)
            most = np.argsort(-ranking.score_ExK, axis=1, kind="stable")
            index_Exr = jnp.asarray(np.sort(most[:, : self._count(w.shape[-2])], axis=1))
            rows_ExrxN = jnp.take_along_axis(w, index_Exr[..., None], axis=1)
            changed[matrix] = _patched(now[matrix], index_Exr, rows_ExrxN)
            error_E = np.asarray(weights.relative_error(w, changed[matrix]), np.float64)
            place = {int(expert): i for i, expert in enumerate(experts_E)}
            rows = [
                _measured(row, error_E[place[row.expert]], ranking.known_E[place[row.expert]])
                if row.matrix == matrix and row.expert in place
                else row
                for row in rows
            ]
        return LayerEdit(with_block_weights(edit.block, changed), tuple(rows), edit.experts)

    def apply_outside(
        self, named: Mapping[str, Weight], plan: Any, key: Array
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        """That of the step, where it has one."""
        if isinstance(self.step, OutsidePass):
            return self.step.apply_outside(named, plan, key)
        return {}, ()

    def _count(self, inputs: int) -> int:
        return max(1, round(self.share * inputs))

    def _shapes(self, block: Block, matrix: str) -> Weight:
        def patched(weight: Weight) -> Weight:
            experts, inputs, columns = weight.shape
            index = jnp.zeros((experts, self._count(inputs)), jnp.int32)
            return _patched(weight, index, jnp.zeros((*index.shape, columns)))

        return jax.eval_shape(patched, block_weights(block)[matrix])


def _quantized(before: Block, after: Block) -> tuple[str, ...]:
    """The expert matrices that were plain and are in a format now."""
    old, new = block_weights(before), block_weights(after)
    return tuple(
        matrix
        for matrix in expert_matrices(after)
        if isinstance(new[matrix], Format) and not isinstance(old[matrix], Format)
    )


def _patched(weight: Weight, index_Exr: Array, rows_ExrxN: Array) -> Weight:
    """Plain parts of Buckets are in full precision: nothing of them is to come back."""
    if isinstance(weight, Buckets):
        ends = np.cumsum(weight.sizes)[:-1]
        split = functools.partial(jnp.split, indices_or_sections=ends)
        parts = zip(weight.parts, split(index_Exr), split(rows_ExrxN), strict=True)
        return Buckets(tuple(_patched(*part) for part in parts))
    if not isinstance(weight, Format):
        return weight
    return weights.patch_rows(weight, index_Exr, rows_ExrxN)


@jax.jit
def _row_errors(w_ExKxN: Array, quantized: Weight) -> Array:
    """||W_j - Q(W)_j||^2 of every input channel j: float32 [E, K]."""
    exact = w_ExKxN.astype(jnp.float32)
    return jnp.square(weights.materialize(quantized) - exact).sum(-1)


def _measured(row: MatrixEdit, relative_error: float, known: bool) -> MatrixEdit:
    """The step's row after the patch; errors of its outputs before the patch no longer hold."""
    missing = None if known else "channels by weight error: no rows"
    why = "; ".join(reason for reason in (row.fallback, missing) if reason) or None
    return dataclasses.replace(
        row,
        relative_error=float(relative_error),
        output_error=None,
        nearest_error=None,
        fallback=why,
        calibrated=row.calibrated and bool(known),
    )
