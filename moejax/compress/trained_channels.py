"""Before and after the training of LoSparse: w = u v + S, S whole; then the channels left of S."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights, with_block_weights
from moejax.compress.factorisations import measured
from moejax.compress.methods import MatrixInputs, Quantized
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight
from moejax.compress.patterns import OUTSIDE, by_layer, in_layer, matching
from moejax.core import SpecError, check_that, spec
from moejax.models import Block, DecoderLM, ModelSpec, parameters, with_parameters
from moejax.train import channels_left
from moejax.weights import Format, LowRank, Sum, Transposed

Plan = dict[int, tuple[str, ...]]  # layer -> names of matrices in it
STORED = jnp.bfloat16


@spec
class LowRankAndRest:
    """w = u v + S: the truncated SVD and all that it leaves over (LoSparse, arXiv:2306.11222).

    In float32, to be trained: `train.PrunesChannels` takes channels of S away, `StoreChannels`
    stores what is left. It saves nothing by itself, and changes no output but by rounding.
    """

    @property
    def least_rank(self) -> int:
        return 1

    def needs(self, matrix: str) -> tuple[Accumulator, ...]:
        return ()

    def inputs(self, matrix: str, stats: LayerStatistics) -> None:
        return None

    def shapes(self, w: Any, rank: int, name: str) -> Sum:
        return jax.eval_shape(functools.partial(_apart, rank=rank, name=name), w)

    def __call__(self, w: Array, rank: int, inputs: MatrixInputs | None, name: str) -> Quantized:
        return measured(w, _apart(w, rank, name))


@spec
class StoreChannels:
    """Of w = u v + S stores factors and the `left` output channels of largest |S_n|, in bfloat16.

    Where `train.PrunesChannels` left as many, nothing but the rounding is lost. A channel is stored
    as that of w itself. `left` = 0 stores the factors alone.
    parameters: a glob over canonical names, as in `Quantize`; SpecError where it names a matrix
    that is no such sum, as `LowRankAndRest` makes it.
    """

    left: float
    parameters: str = "layers.*.moe.experts.*"

    def check(self) -> None:
        check_that(0 <= self.left <= 1, self, "left", "Give a share from 0 (none) to 1 (all).")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        names, named = self._names(model.spec), parameters(model)
        for name in names:
            _require_sum(named[name], name)
            named[name] = jax.eval_shape(self._stored, named[name])
        return with_parameters(model.spec, named), names

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: weights change."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Plan:
        return by_layer(self._names(model.spec))

    def apply_layer(
        self, index: int, block: Block, plan: Plan, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        named, edits = block_weights(block), []
        changed: dict[str, Weight] = {}
        for name in plan.get(index, ()):
            changed[name] = self._stored(named[name])
            whole = weights.materialize(named[name])
            errors = jnp.atleast_1d(weights.relative_error(whole, changed[name])).tolist()
            experts = range(len(errors)) if name.startswith(EXPERTS) else (None,)
            pairs = zip(experts, errors, strict=True)
            edits += [MatrixEdit(name, expert, relative_error=error) for expert, error in pairs]
        return LayerEdit(with_block_weights(block, changed), tuple(edits))

    def _names(self, model: ModelSpec) -> tuple[str, ...]:
        names = matching("StoreChannels.parameters", self.parameters, model)
        for name in names:
            if in_layer(name)[0] == OUTSIDE:
                raise SpecError(
                    f"StoreChannels.parameters = {self.parameters!r} names {name}.",
                    "Choose a glob of matrices inside layers, such as 'layers.*.moe.experts.*'.",
                    field="parameters",
                )
        return names

    def _stored(self, w: Sum) -> Format:
        pair, rest = w.terms
        assert isinstance(pair, LowRank) and not isinstance(rest, Format)
        u, v = pair.factors
        count = channels_left(self.left, w.shape[-1])
        if not count:
            return LowRank(u.astype(STORED), v.astype(STORED))
        # Output channels are the rows of the transpose.
        turned = LowRank(*(jnp.swapaxes(f, -1, -2).astype(STORED) for f in (v, u)))
        size = jnp.square(rest.astype(jnp.float32)).sum(-2)
        index = jnp.sort(jnp.argsort(-size, axis=-1, stable=True)[..., :count], axis=-1)
        columns = jnp.swapaxes(weights.materialize(w), -1, -2)
        rows = jnp.take_along_axis(columns, index[..., None], axis=-2)
        return Transposed(weights.patch_rows(turned, index, rows))


def _apart(w: Array, rank: int, name: str) -> Sum:
    exact = w.astype(jnp.float32)
    pair = weights.truncated_svd(exact, rank, jnp.float32, name)
    return Sum((pair, exact - weights.materialize(pair)))


def _require_sum(w: Weight, name: str) -> None:
    fits = isinstance(w, Sum) and len(w.terms) == 2 and isinstance(w.terms[0], LowRank)
    if not fits or isinstance(w.terms[1], Format):
        raise SpecError(
            f"StoreChannels: {name} is no sum of factors and an array.",
            "Put Factorise with LowRankAndRest, and a Recover with PrunesChannels, before it.",
        )
