"""Low-rank terms beside weights in any format, for a recovery to train."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights, with_block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight
from moejax.compress.patterns import OUTSIDE, by_layer, in_layer, matching
from moejax.core import SpecError, check_that, keys, spec
from moejax.models import Block, DecoderLM, ModelSpec, parameters, with_parameters
from moejax.weights import LowRank, Sum

Plan = dict[int, tuple[str, ...]]  # layer -> names of matrices in it


@spec
class AddAdapters:
    """w becomes w + u v with v = 0: the function stays until u and v are trained (2106.09685).

    Whatever format w has; codes stay frozen under `train.Adapters`, as in QLoRA (arXiv:2305.14314).
    u is normal with deviation 1 / sqrt(rank). parameters: a glob over canonical names of matrices
    in layers. SpecError for a rank above a matrix's.
    """

    rank: int
    parameters: str = "layers.*.moe.experts.*"

    def check(self) -> None:
        check_that(self.rank >= 1, self, "rank", "4 to 64 are usual.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        names, named = self._names(model.spec), parameters(model)
        for name in names:
            most = min(named[name].shape[-2:])
            if self.rank > most or in_layer(name)[0] == OUTSIDE:
                raise SpecError(
                    f"AddAdapters.rank = {self.rank} does not fit {name}, "
                    f"{' x '.join(map(str, named[name].shape[-2:]))}.",
                    f"Give 1 to {most}, and matrices in layers.",
                    field="rank",
                )
            add = functools.partial(self._added, key=jax.random.key(0))
            named[name] = jax.eval_shape(add, named[name])
        return with_parameters(model.spec, named), names

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Nothing: every output is what it was."""
        return False

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        return by_layer(self._names(model.spec))

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        named, changed, edits = block_weights(block), {}, []
        for number, name in enumerate(plan.get(index, ())):
            changed[name] = self._added(named[name], keys.fold(key, number))
            experts = range(named[name].shape[0]) if name.startswith(EXPERTS) else (None,)
            edits += [MatrixEdit(name, expert, relative_error=0.0) for expert in experts]
        return LayerEdit(with_block_weights(block, changed), tuple(edits))

    def _names(self, model: ModelSpec) -> tuple[str, ...]:
        return matching("AddAdapters.parameters", self.parameters, model)

    def _added(self, w: Weight, key: Array) -> Sum:
        *lead, K, N = w.shape
        u = jax.random.normal(key, (*lead, K, self.rank), jnp.float32) * self.rank**-0.5
        return Sum((w, LowRank(u, jnp.zeros((*lead, self.rank, N), jnp.float32))))
