"""Round-to-nearest quantization of matrices chosen by name (MoQE, arXiv:2310.02410)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights, with_block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit, Quantizer, Weight, require_dense
from moejax.compress.patterns import OUTSIDE, in_layer, matching
from moejax.core import spec
from moejax.models import Block, DecoderLM, ModelSpec, parameters, with_parameters

Plan = dict[int, tuple[str, ...]]  # layer, or OUTSIDE -> names of matrices in it


@spec
class FullPrecision:
    """Leaves a weight as it is: the full budget, at which a pass must be the identity."""

    def __call__(self, w: Array, name: str = "") -> Array:
        return w


@spec
class RoundToNearest:
    """Every weight to the nearest point of its grid; no data decides anything.

    MoQE (arXiv:2310.02410) is this with the default `parameters`: expert matrices alone, a
    symmetric or a log2 grid with one scale per output channel (`group=None`).
    parameters: a glob over canonical names; routers, norms, embeddings and the head are meant only
    where it spells them out. SpecError when it names nothing, a vector, or a matrix that the grid
    does not fit.
    """

    grid: Quantizer
    parameters: str = "layers.*.moe.experts.*"

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        names, named = self._names(model.spec), parameters(model)
        made: dict[tuple, Weight] = {}  # traced once per shape, not once per layer
        for name in names:
            require_dense(named[name], name)
            kind = (named[name].shape, named[name].dtype)
            if kind not in made:
                made[kind] = jax.eval_shape(functools.partial(self.grid, name=name), named[name])
            named[name] = made[kind]
        return with_parameters(model.spec, named), names

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: other weights give later layers other inputs, and so other choices."""
        return True

    def decide(self, stats: Statistics, model: ModelSpec) -> Plan:
        plan: Plan = {}
        for name in self._names(model):
            layer, within = in_layer(name)
            plan[layer] = (*plan.get(layer, ()), within)
        return plan

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        named = block_weights(block)
        changed, edits = self._round(named, plan.get(index, ()), f"layers.{index}.")
        return LayerEdit(with_block_weights(block, changed), edits)

    def apply_outside(
        self, named: Mapping[str, Weight], plan: Plan, key: Array
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        return self._round(named, plan.get(OUTSIDE, ()), "")

    def _names(self, model: ModelSpec) -> tuple[str, ...]:
        return matching("RoundToNearest.parameters", self.parameters, model)

    def _round(
        self, named: Mapping[str, Weight], names: Iterable[str], prefix: str
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        changed: dict[str, Weight] = {}
        edits: list[MatrixEdit] = []
        for name in names:
            original = named[name]
            require_dense(original, prefix + name)
            changed[name] = self.grid(original, prefix + name)
            error = np.asarray(weights.relative_error(original, changed[name]), np.float64)
            if name.startswith(EXPERTS):
                edits += [MatrixEdit(name, e, relative_error=float(x)) for e, x in enumerate(error)]
            else:
                edits.append(MatrixEdit(name, None, relative_error=float(error)))
        return changed, tuple(edits)
