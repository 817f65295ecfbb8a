"""MoEfication: a dense model's feed-forwards cut into experts, without training.

With all experts on, the MoE is the dense model to rounding (arXiv:2110.01786; arXiv:2406.16554).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax import weights
from moejax.core import SpecError, spec
from moejax.models import DecoderLM, DenseSpec, LayerSpec, ModelSpec, parameters, with_parameters
from moejax.moe import ChosenSoftmaxGates, MoESpec, RouterSpec, TopK, UnitGates
from moejax.upcycle.split import BalancedKMeans, Split


@runtime_checkable
class RouterStart(Protocol):
    """What the experts of a split feed-forward are chosen and weighed by, to begin with.

    With all experts chosen, every gate must be 1.
    """

    def router(self, experts: int, top_k: int) -> RouterSpec: ...

    def kernel(self, gate_ExDxF: Array) -> Array:
        """Router weights [D, E] of experts with these gate matrices."""
        ...


@spec
class CentreRouting:
    """A token goes to the experts whose mean gate vector it is most aligned with; gates are 1.

    MoEfication's choice by similarity (arXiv:2110.01786), which needs no data.
    """

    def router(self, experts: int, top_k: int) -> RouterSpec:
        return RouterSpec(selector=TopK(k=top_k), gates=UnitGates())

    def kernel(self, gate_ExDxF: Array) -> Array:
        centre_ExD = jnp.mean(gate_ExDxF.astype(jnp.float32), axis=-1)
        return (centre_ExD / jnp.linalg.norm(centre_ExD, axis=-1, keepdims=True)).T


@spec
class ZeroRouting:
    """LLaMA-MoE's gate before training: zero logits, softmax over the chosen times E.

    A softmax over all E gives 1 / E each, so the scale that keeps the function is E; with fewer
    chosen each counts E / k, as that paper rescales. All ties: before training, the first k experts
    are chosen for every token.
    """

    def router(self, experts: int, top_k: int) -> RouterSpec:
        gates = ChosenSoftmaxGates(scale=float(experts))
        return RouterSpec(selector=TopK(k=top_k), gates=gates)

    def kernel(self, gate_ExDxF: Array) -> Array:
        E, D, _ = gate_ExDxF.shape
        return jnp.zeros((D, E), jnp.float32)


def moefy(
    model: DecoderLM,
    experts: int,
    top_k: int,
    *,
    split: Split = BalancedKMeans(),
    start: RouterStart = CentreRouting(),
    seed: int = 0,
) -> DecoderLM:
    """The model with every dense feed-forward cut into `experts` experts; it is left as it was.

    seed: of splits that draw. SpecError if no layer is dense, `experts` does not divide a hidden
    width, top_k exceeds it, or a feed-forward is in a compressed format.
    """
    spec = moefied_spec(model.spec, experts, top_k, start=start)
    named = parameters(model)
    for layer, (old, new) in enumerate(zip(model.spec.layers, spec.layers, strict=True)):
        if old == new:
            continue
        dense = f"layers.{layer}.ffn."
        gate, up, down = (_plain(named.pop(dense + name), dense + name) for name in _MATRICES)
        random = np.random.default_rng((seed, layer))
        order_F = split(np.asarray(gate, np.float32), experts, random)
        gate_ExDxF, up_ExDxF = (_columns(matrix, order_F, experts) for matrix in (gate, up))
        moe = f"layers.{layer}.moe."
        named[f"{moe}experts.gate"], named[f"{moe}experts.up"] = gate_ExDxF, up_ExDxF
        named[f"{moe}experts.down"] = down[order_F].reshape(experts, -1, down.shape[1])
        named[f"{moe}router.scores.kernel"] = start.kernel(gate_ExDxF)
    return with_parameters(spec, named)


def moefied_spec(
    dense: ModelSpec, experts: int, top_k: int, *, start: RouterStart = CentreRouting()
) -> ModelSpec:
    """The spec that `moefy` gives a model of this spec; SpecError as there."""
    if not any(isinstance(layer.ffn, DenseSpec) for layer in dense.layers):
        raise SpecError(
            "the model has no dense feed-forward to split.", "Start from a dense model."
        )
    layers = tuple(_moefied_layer(layer, experts, top_k, start) for layer in dense.layers)
    return dataclasses.replace(dense, layers=layers)


_MATRICES = ("gate", "up", "down")


def _moefied_layer(layer: LayerSpec, experts: int, top_k: int, start: RouterStart) -> LayerSpec:
    ffn = layer.ffn
    if not isinstance(ffn, DenseSpec):
        return layer
    if experts < 1 or ffn.width % experts:
        raise SpecError(
            f"experts = {experts} do not divide the hidden width {ffn.width}.",
            "Choose a divisor of it.",
            field="experts",
        )
    router = start.router(experts, top_k)
    width = ffn.width // experts
    moe = MoESpec(experts=experts, width=width, router=router, activation=ffn.activation)
    return dataclasses.replace(layer, ffn=moe)


def _plain(weight: Any, name: str) -> Array:
    if isinstance(weight, weights.Format):
        raise SpecError(
            f"{name} is {type(weight).__name__}, whose neurons cannot be told apart.",
            "Split the model before it is compressed.",
        )
    return weight


def _columns(matrix_DxF: Array, order_F: np.ndarray, experts: int) -> Array:
    """[E, D, F / E]: the columns of each expert."""
    return matrix_DxF[:, order_F].reshape(len(matrix_DxF), experts, -1).swapaxes(0, 1)
