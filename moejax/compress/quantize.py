"""Quantization of matrices chosen by name, all on one grid (MoQE, arXiv:2310.02410; GPTQ; HQQ)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights, with_block_weights
from moejax.compress.methods import Choice, Method, RoundToNearest, edits
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight, require_dense
from moejax.compress.patterns import OUTSIDE, by_layer, in_layer, matching
from moejax.core import spec
from moejax.models import Block, DecoderLM, ModelSpec, parameters, with_parameters

Plan = dict[int, tuple[str, ...]]  # layer, or OUTSIDE -> names of matrices in it


@spec
class Quantize:
    """Puts every matrix that `parameters` names on `grid`.

    MoQE (arXiv:2310.02410) is this with the default method and parameters: expert matrices alone, a
    symmetric or a log2 grid with one scale per output channel (`group=None`). With `GPTQ` as the
    method it is GPTQ on experts, with an `HQQGrid` HQQ.
    parameters: a glob over canonical names; routers, norms, embeddings and the head are meant only
    where it spells them out. SpecError when it names nothing, a vector, or a matrix that the grid
    does not fit.
    """

    grid: Choice
    method: Method = RoundToNearest()
    parameters: str = "layers.*.moe.experts.*"

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        names, named = self._names(model.spec), parameters(model)
        made: dict[tuple, Weight] = {}  # traced once per shape, not once per layer
        for name in names:
            require_dense(named[name], name)
            self.method.needs(in_layer(name)[1])
            kind = (named[name].shape, named[name].dtype)
            if kind not in made:
                made[kind] = jax.eval_shape(functools.partial(self.grid, name=name), named[name])
            named[name] = made[kind]
        return with_parameters(model.spec, named), names

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        matrices = dict.fromkeys(in_layer(name)[1] for name in self._names(model))
        return tuple(dict.fromkeys(a for matrix in matrices for a in self.method.needs(matrix)))

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: other weights give later layers other inputs, and so other choices."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        return by_layer(self._names(model.spec))

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        changed, edits = self._quantized(
            block_weights(block), plan.get(index, ()), f"layers.{index}.", stats
        )
        return LayerEdit(with_block_weights(block, changed), edits)

    def apply_outside(
        self, named: Mapping[str, Weight], plan: Plan, key: Array
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        return self._quantized(named, plan.get(OUTSIDE, ()), "", {})

    def _names(self, model: ModelSpec) -> tuple[str, ...]:
        return matching("Quantize.parameters", self.parameters, model)

    def _quantized(
        self,
        named: Mapping[str, Weight],
        matrices: Iterable[str],
        prefix: str,
        stats: LayerStatistics,
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        changed: dict[str, Weight] = {}
        rows: list[MatrixEdit] = []
        for matrix in matrices:
            w, name = named[matrix], prefix + matrix
            require_dense(w, name)
            found = self.method(w, self.grid, self.method.inputs(matrix, stats), name)
            changed[matrix] = found.weight
            experts = np.arange(w.shape[0]) if matrix.startswith(EXPERTS) else None
            rows += edits(matrix, found, experts)
        return changed, tuple(rows)
