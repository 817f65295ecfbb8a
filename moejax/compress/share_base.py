"""One common expert per layer and a compressed residual for each (ResMoE, arXiv:2503.06881)."""

from __future__ import annotations

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import block_weights, expert_matrices, with_block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight, require_dense
from moejax.core import SpecError, check_that, spec
from moejax.models import (
    Block,
    DecoderLM,
    ModelSpec,
    hidden_units,
    layers,
    parameters,
    permute_hidden,
    with_parameters,
)
from moejax.weights import Pattern, PerMatrix, SharedBase, align, barycentre, truncated_svd

STORED = jnp.bfloat16  # of the base and of low-rank residuals


@runtime_checkable
class Centre(Protocol):
    """(order_ExF, share_E): hidden units in the centre's order, and its part of each expert."""

    def __call__(self, block: Block) -> tuple[np.ndarray, np.ndarray]: ...


@spec
class Barycentre:
    """The Wasserstein barycentre of the experts as sets of hidden units, at most `rounds` rounds.

    Units are transported by exact assignment (arXiv:2503.06881, section 4). The centre is the mean
    of the experts whose units are in its order.
    """

    rounds: int = 100

    def check(self) -> None:
        check_that(self.rounds >= 1, self, "rounds", "100 is the released code's limit.")

    def __call__(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        units_ExFxP = hidden_units(block)
        return barycentre(units_ExFxP, self.rounds)[1], _mean(len(units_ExFxP))


@spec
class PlainMean:
    """The mean of the experts as they are stored: the control of a barycentre."""

    def __call__(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        E, F, _ = hidden_units(block).shape
        return np.tile(np.arange(F), (E, 1)), _mean(E)


@spec
class FirstExpert:
    """Expert 0, the others' units assigned to its: what a barycentre starts from."""

    def __call__(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        units_ExFxP = hidden_units(block)
        order_ExF = np.stack([align(units_FxP, units_ExFxP[0]) for units_FxP in units_ExFxP])
        return order_ExF, np.eye(len(units_ExFxP))[0]


@runtime_checkable
class Residual(Protocol):
    """Stores the residuals [E, K, N] of a matrix; `name` is for errors. Any grid is one."""

    def __call__(self, w: Array, name: str = "") -> Weight: ...


@spec
class LowRankResidual:
    """The best approximation of rank `rank`, factors in bfloat16; SpecError above a matrix's."""

    rank: int

    def check(self) -> None:
        check_that(self.rank >= 1, self, "rank", "At least 1.")

    def __call__(self, w: Array, name: str = "") -> Weight:
        most = min(w.shape[-2:])
        if self.rank > most:
            raise SpecError(
                f"LowRankResidual.rank = {self.rank} is above the rank of {name}, {most}.",
                f"Choose 1 to {most}.",
                field="rank",
            )
        return truncated_svd(w, self.rank, STORED)


@spec
class SparseResidual:
    """The largest weights of the residual that `pattern` keeps, in bfloat16 (arXiv:2503.06881).

    The released code's default: of each matrix a quarter stays, by magnitude.
    """

    pattern: Pattern = PerMatrix(sparsity=0.75)

    def __call__(self, w: Array, name: str = "") -> Weight:
        weights.check_pattern(self.pattern, w, name)
        return self.pattern.pack(w, self.pattern.keep(jnp.abs(w)), name=name)


@spec
class ShareBase:
    """Each expert matrix becomes the layer's common one plus a residual stored by `residual`.

    Data-free: weights alone decide. SpecError for experts in a format, or a residual that does not
    fit a matrix. matrices: which are stored so; units are matched by all of them. relative_error in
    the ledger is of the matrix, not of its residual.
    """

    residual: Residual
    centre: Centre = Barycentre()
    matrices: tuple[str, ...] = ("moe.experts.gate", "moe.experts.up", "moe.experts.down")

    def check(self) -> None:
        known = ("moe.experts.gate", "moe.experts.up", "moe.experts.down")
        fits = 0 < len(self.matrices) == len(set(self.matrices)) and set(self.matrices) <= set(
            known
        )
        check_that(fits, self, "matrices", f"Name some of {', '.join(known)}.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        if not model.spec.moe_layers:
            raise SpecError("ShareBase: the model has no experts.", "Choose a MoE model.")
        named, blocks = parameters(model), layers(model)
        for index in model.spec.moe_layers:
            for name in expert_matrices(blocks[index]):  # units are matched by all matrices
                require_dense(named[f"layers.{index}.{name}"], f"layers.{index}.{name}")
        names = [
            f"layers.{index}.{name}" for index in model.spec.moe_layers for name in self.matrices
        ]
        for name in names:
            store = functools.partial(self._stored, name=name)
            base = jax.ShapeDtypeStruct((1, *named[name].shape[1:]), STORED)
            named[name] = jax.eval_shape(store, named[name], base)
        return with_parameters(model.spec, named), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return ()

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: weights change."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> None:
        return None

    def apply_layer(
        self, index: int, block: Block, plan: None, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        if block.moe is None:
            return LayerEdit(block)
        order_ExF, share_E = self.centre(block)
        aligned = permute_hidden(block, order_ExF)
        changed: dict[str, Weight] = {}
        edits: list[MatrixEdit] = []
        for name in self.matrices:
            w = block_weights(aligned)[name].astype(jnp.float32)
            exact = jax.lax.Precision.HIGHEST
            mean = jnp.einsum("e,ekn->kn", jnp.asarray(share_E, jnp.float32), w, precision=exact)
            made = self._stored(w, mean[None].astype(STORED), name=f"layers.{index}.{name}")
            error_E = weights.relative_error(w, made)
            changed[name] = made
            edits += [MatrixEdit(name, e, relative_error=float(x)) for e, x in enumerate(error_E)]
        return LayerEdit(with_block_weights(aligned, changed), tuple(edits))

    def _stored(self, w: Array, base: Array, name: str) -> SharedBase:
        return SharedBase(base, self.residual(w - base.astype(w.dtype), name))


def _mean(experts: int) -> np.ndarray:
    return np.full(experts, 1 / experts)
