"""What a compression pass is: one decision over the whole model, then one edit per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.core.errors import SpecError
from moejax.models import Block, DecoderLM, ModelSpec
from moejax.weights import Format

Weight = Any  # a jax array or a moejax.weights.Format


@dataclass(frozen=True)
class MatrixEdit:
    """What a pass did to one matrix, of one expert or of none; the driver adds what it costs.

    matrix: name within the layer ("moe.experts.gate"), or of the model for a matrix outside layers.
    expert: index in the block before the edit, None for a matrix of no expert.
    calibrated: whether the statistics sufficed, for a pass that asks more than one token.
    The other fields are those of `runs.LedgerRow`.
    """

    matrix: str
    expert: int | None
    relative_error: float | None = None
    output_error: float | None = None
    nearest_error: float | None = None
    fallback: str | None = None
    calibrated: bool = True
    lineage: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerEdit:
    """A block after a pass.

    experts: where the number or order of stored experts changed, the index that each had before.
    merged_into: where experts were merged, for each expert before the one whose place theirs is.
    """

    block: Block
    matrices: tuple[MatrixEdit, ...] = ()
    experts: tuple[int, ...] | None = None
    merged_into: tuple[int, ...] | None = None


@runtime_checkable
class Pass(Protocol):
    """A step of a recipe; a frozen spec."""

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        """On a model of shapes: what it will become, and the names of the weights it touches.

        Runs before any work is done: raises SpecError for a model that the pass cannot treat.
        """
        ...

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        """The statistics that `decide` reads."""
        ...

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        """The statistics that `apply_layer` reads."""
        ...

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Whether a statistic of the model before this pass no longer holds after it."""
        ...

    def decide(self, stats: Statistics, model: DecoderLM) -> Any:
        """The plan for the whole model: scores, allocation, grouping."""
        ...

    def apply_layer(
        self, index: int, block: Block, plan: Any, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        """Layer `index` after the pass. key: of this pass and layer."""
        ...


@runtime_checkable
class OutsidePass(Pass, Protocol):
    """A pass that may also touch weights outside the layers: `embed`, `head`."""

    def apply_outside(
        self, named: Mapping[str, Weight], plan: Any, key: Array
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        """The changed ones of the weights `named`, and what was done to them."""
        ...


@runtime_checkable
class Stage(Protocol):
    """A step of a recipe that is no pass: it takes the whole model and trains it, for instance."""

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        """As that of a `Pass`."""
        ...

    def compares(self, model: ModelSpec, original: ModelSpec) -> None:
        """Raises SpecError where it cannot bring this model nearer to the one of the arm."""
        ...

    def run(self, model: DecoderLM, original: DecoderLM, folder: Path) -> DecoderLM:
        """The model after it. original: what the recipe began with, not to be changed.

        folder: for what it writes as it goes; a run that was cut off is resumed from there.
        """
        ...


def require_dense(w: Weight, name: str) -> None:
    """Raises SpecError when a weight already has a format other than a plain array."""
    if isinstance(w, Format):
        raise SpecError(
            f"{name} is already stored as {type(w).__name__}.",
            "Let one pass of the recipe choose the format of a matrix.",
        )
