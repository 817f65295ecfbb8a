"""Unstructured and N:M pruning of matrices chosen by name (Wanda, SparseGPT, MoE-Pruner)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights, with_block_weights
from moejax.compress.layer_patterns import LayerPatterns
from moejax.compress.methods import edits
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight, require_dense
from moejax.compress.patterns import OUTSIDE, by_layer, in_layer, matching
from moejax.compress.pruning_methods import Magnitude, PruningMethod
from moejax.core import spec
from moejax.models import Block, DecoderLM, ModelSpec, parameters, with_parameters
from moejax.weights import Pattern

Plan = dict[int, tuple[Pattern, tuple[str, ...]]]


@spec
class Sparsify:
    """Prunes every matrix that `parameters` names to `pattern`; what stays is stored in bfloat16.

    method: which weights go. parameters: a glob as in `Quantize`; SpecError when it names nothing,
    a vector, a matrix in a format, or one that the pattern does not divide.
    """

    pattern: Pattern | LayerPatterns
    method: PruningMethod = Magnitude()
    parameters: str = "layers.*.moe.experts.*"

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        names, named = self._names(model.spec), parameters(model)
        if isinstance(self.pattern, LayerPatterns):
            self.pattern.needs(self._matrices(model.spec))
        for name in names:
            require_dense(named[name], name)
            self.method.needs(in_layer(name)[1])
            named[name] = jax.eval_shape(functools.partial(self._shape, name=name), named[name])
        return with_parameters(model.spec, named), names

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        if not isinstance(self.pattern, LayerPatterns):
            return ()
        return self.pattern.needs(self._matrices(model))

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        found = (a for matrix in self._matrices(model) for a in self.method.needs(matrix))
        return tuple(dict.fromkeys(found))

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: other weights give later layers other inputs, and so other choices."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        matrices = by_layer(self._names(model.spec))
        if not isinstance(self.pattern, LayerPatterns):
            return {layer: (self.pattern, found) for layer, found in matrices.items()}
        patterns = self.pattern.decide(stats, model, matrices)
        return {layer: (patterns[layer], found) for layer, found in matrices.items()}

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if index not in plan:
            return LayerEdit(block)
        changed, rows = self._pruned(block_weights(block), *plan[index], f"layers.{index}.", stats)
        return LayerEdit(with_block_weights(block, changed), rows)

    def apply_outside(
        self, named: Mapping[str, Weight], plan: Plan, key: Array
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        if OUTSIDE not in plan:
            return {}, ()
        return self._pruned(named, *plan[OUTSIDE], "", {})

    def _names(self, model: ModelSpec) -> tuple[str, ...]:
        return matching("Sparsify.parameters", self.parameters, model)

    def _matrices(self, model: ModelSpec) -> tuple[str, ...]:
        return tuple(dict.fromkeys(in_layer(name)[1] for name in self._names(model)))

    def _shape(self, w: Array, name: str) -> Weight:
        pattern = self.pattern.mean if isinstance(self.pattern, LayerPatterns) else self.pattern
        weights.check_pattern(pattern, w, name)
        strips = self.method.strips(pattern, w.shape[-2])
        return pattern.pack(w, w > 0, strips=strips, name=name)

    def _pruned(
        self,
        named: Mapping[str, Weight],
        pattern: Pattern,
        matrices: Iterable[str],
        prefix: str,
        stats: LayerStatistics,
    ) -> tuple[dict[str, Weight], tuple[MatrixEdit, ...]]:
        changed: dict[str, Weight] = {}
        rows: list[MatrixEdit] = []
        for matrix in matrices:
            w, name = named[matrix], prefix + matrix
            require_dense(w, name)
            found = self.method(w, pattern, self.method.inputs(matrix, stats), name)
            changed[matrix] = found.weight
            experts = np.arange(w.shape[0]) if matrix.startswith(EXPERTS) else None
            rows += edits(matrix, found, experts)
        return changed, tuple(rows)
