"""Low rank: matrices chosen by name, each taken apart at the rank that a policy gives it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.calibrate import Accumulator, LayerStatistics, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights, with_block_weights
from moejax.compress.factorisations import Factorisation
from moejax.compress.methods import MatrixInputs, edits
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight, require_dense
from moejax.compress.patterns import OUTSIDE, in_layer, matching, parameter_shapes
from moejax.compress.ranks import RankPolicy, Ranks, Shapes, UniformRank
from moejax.core import SpecError, spec
from moejax.models import Block, DecoderLM, ModelSpec, layers, permute_experts, with_layers
from moejax.moe import MoESpec


@spec
class Factorise:
    """Takes every matrix that `parameters` names apart by `method`, at ranks that `ranks` gives.

    Where experts of a layer get several ranks they are reordered, router rows with them, so that
    those of one rank lie side by side (`weights.Buckets`); the function of the layer does not
    depend on their order.
    parameters: a glob over canonical names, as in `Quantize`; of matrices inside layers.
    SpecError where a rank does not fit a matrix or the method, a matrix has a format already, or
    experts behind a slot map, which keep their order, are to get ranks of their own.
    """

    ranks: RankPolicy
    method: Factorisation
    parameters: str = "layers.*.moe.experts.*"

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        blocks, names = layers(model), []
        shapes = self._shapes(model.spec)
        for index, ranks in self.ranks.outline(shapes).items():
            named, changed = block_weights(blocks[index]), {}
            for matrix, rank in ranks.items():
                name, w = f"layers.{index}.{matrix}", named[matrix]
                require_dense(w, name)
                self.method.needs(matrix)
                if matrix.startswith(EXPERTS) and not isinstance(self.ranks, UniformRank):
                    _require_no_slots(blocks[index], name)
                names.append(name)
                changed[matrix] = self._outlined(w, rank, name)
            blocks[index] = with_block_weights(blocks[index], changed)
        return with_layers(model, blocks), tuple(names)

    def needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        return self.ranks.needs()

    def layer_needs(self, model: ModelSpec) -> tuple[Accumulator, ...]:
        matrices = {matrix: None for within in self._shapes(model).values() for matrix in within}
        return tuple(dict.fromkeys(a for matrix in matrices for a in self.method.needs(matrix)))

    def invalidates(self, accumulator: Accumulator) -> bool:
        """Everything: other weights, and another order of experts."""
        return True

    def decide(self, stats: Statistics, model: DecoderLM) -> Ranks:
        return self.ranks.decide(stats, model, self._shapes(model.spec))

    def apply_layer(
        self, index: int, block: Block, plan: Ranks, stats: LayerStatistics, key: Array
    ) -> LayerEdit:
        ranks = plan.get(index, {})
        banks = {matrix: r for matrix, r in ranks.items() if matrix.startswith(EXPERTS)}
        order = _by_rank(list(banks.values()))
        named = block_weights(block)
        changed: dict[str, Weight] = {}
        rows: list[MatrixEdit] = []
        for matrix, rank in ranks.items():
            name = f"layers.{index}.{matrix}"
            require_dense(named[matrix], name)
            inputs = self.method.inputs(matrix, stats)
            if matrix not in banks:
                found = self.method(named[matrix], int(rank), inputs, name)
                changed[matrix] = found.weight
                rows += edits(matrix, found)
                continue
            parts: list[Weight] = []
            for experts in _runs(rank, order):
                some, at = jnp.asarray(experts), int(rank[experts[0]])
                found = self.method(named[matrix][some], at, _taken(inputs, experts), name)
                parts.append(found.weight)
                rows += edits(matrix, found, experts)
            changed[matrix] = parts[0] if len(parts) == 1 else weights.Buckets(tuple(parts))
        kept = tuple(order.tolist())
        if kept == tuple(range(len(kept))):
            return LayerEdit(with_block_weights(block, changed), tuple(rows))
        permuted = permute_experts(block, kept)
        return LayerEdit(with_block_weights(permuted, changed), tuple(rows), experts=kept)

    def _shapes(self, model: ModelSpec) -> Shapes:
        found: dict[int, dict[str, tuple[int, ...]]] = {}
        shapes = parameter_shapes(model)
        for name in matching("Factorise.parameters", self.parameters, model):
            layer, within = in_layer(name)
            if layer == OUTSIDE:
                raise SpecError(
                    f"Factorise.parameters = {self.parameters!r} names {name}.",
                    "Choose a glob of matrices inside layers, such as 'layers.*.moe.experts.*'.",
                    field="parameters",
                )
            found.setdefault(layer, {})[within] = shapes[name]
        return found

    def _require_method(self, name: str) -> None:
        if self.ranks.least_rank < self.method.least_rank:
            raise SpecError(
                f"{type(self.ranks).__name__} may give {name} rank {self.ranks.least_rank}, and "
                f"{type(self.method).__name__} makes none below {self.method.least_rank}.",
                "Raise the least rank, or use CompensatedGrid, which takes 0.",
                field="ranks",
            )

    def _outlined(self, w: Weight, rank: np.ndarray, name: str) -> Weight:
        self._require_method(name)
        if rank.ndim == 0:
            return self.method.shapes(w, int(rank), name)
        parts = []
        for at, count in zip(*np.unique(rank, return_counts=True), strict=True):
            some = jax.ShapeDtypeStruct((int(count), *w.shape[1:]), w.dtype)
            parts.append(self.method.shapes(some, int(at), name))
        return parts[0] if len(parts) == 1 else weights.Buckets(tuple(parts))


def _by_rank(banks: list[np.ndarray]) -> np.ndarray:
    """An order of experts in which equal ranks are neighbours; the first bank counts first."""
    if not banks:
        return np.arange(0)
    return np.lexsort([np.arange(len(banks[0])), *reversed(banks)])


def _runs(rank_E: np.ndarray, order_E: np.ndarray) -> list[np.ndarray]:
    """The experts in that order, cut where the rank changes."""
    ranks = rank_E[order_E]
    return np.split(order_E, np.flatnonzero(np.diff(ranks)) + 1)


def _taken(inputs: MatrixInputs | None, experts: np.ndarray) -> MatrixInputs | None:
    return inputs and MatrixInputs(inputs.moments[experts], inputs.tokens[experts])


def _require_no_slots(block: Block, name: str) -> None:
    ffn = block.spec.ffn
    if isinstance(ffn, MoESpec) and ffn.slots is not None:
        raise SpecError(
            f"{name} holds {ffn.stored} stored experts for {ffn.experts} of the router's.",
            "Factorise experts before they are merged or replicated, or by UniformRank.",
        )
