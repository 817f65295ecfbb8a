"""Ternary matrices under QMoE's dictionary, below one bit per weight (arXiv:2310.16795)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights, with_block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit
from moejax.compress.patterns import OUTSIDE, by_layer, in_layer, matching
from moejax.core import SpecError, spec
from moejax.models import Block, DecoderLM, ModelSpec, parameters, with_parameters
from moejax.weights.dictionary import check_pairs
from moejax.weights.ternary import require_ternary

Plan = dict[int, tuple[str, ...]]
_OUTLINED_BITS = 0.875  # of a matrix with 85 % zeros, which few are below


@spec
class DictionaryCode:
    """Stores ternary matrices that `parameters` names as codewords; no weight changes.

    After `Quantize(grid=TernaryRows())`. How many bytes it takes is known once the codes are: plans
    count 0.875 bits per weight, those of 85 % zeros.
    SpecError for a matrix of another format, or of an odd number of inputs.
    """

    parameters: str = "layers.*.moe.experts.*"

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        names, named = self._names(model.spec), parameters(model)
        for name in names:
            w = require_ternary(named[name], name)
            *lead, inputs, columns = w.shape
            check_pairs(inputs, name)
            count = int(np.ceil(_OUTLINED_BITS / 16 * inputs * columns)) + columns
            codes: Any = jax.ShapeDtypeStruct((*lead, count), jnp.uint16)
            named[name] = weights.DictionaryCoded(codes, w.low, w.high, inputs)
        return with_parameters(model.spec, named), names

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Nothing: the model computes what it did."""
        return False

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        return by_layer(self._names(model.spec))

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        named, rows, changed = block_weights(block), [], {}
        for matrix in plan.get(index, ()):
            name = f"layers.{index}.{matrix}"
            changed[matrix] = weights.encode(require_ternary(named[matrix], name), name)
            experts = range(named[matrix].shape[0]) if matrix.startswith(EXPERTS) else (None,)
            rows += [MatrixEdit(matrix, expert, relative_error=0.0) for expert in experts]
        return LayerEdit(with_block_weights(block, changed), tuple(rows))

    def _names(self, model: ModelSpec) -> tuple[str, ...]:
        names = matching("DictionaryCode.parameters", self.parameters, model)
        outside = [name for name in names if in_layer(name)[0] == OUTSIDE]
        if outside:
            raise SpecError(
                f"DictionaryCode.parameters = {self.parameters!r} names {outside[0]}.",
                "Choose a glob of matrices inside layers, such as 'layers.*.moe.experts.*'.",
                field="parameters",
            )
        return names
