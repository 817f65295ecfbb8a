"""Patterns of sparsity that differ by layer (OWL, arXiv:2310.05175)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.calibrate import Accumulator, Routed, Statistics
from moejax.compress.block_weights import block_weights
from moejax.compress.methods import input_needs, matrix_inputs
from moejax.core import check_that, spec
from moejax.models import DecoderLM, layers
from moejax.weights import Pattern, PerMatrix, PerOutput

Matrices = dict[int, tuple[str, ...]]  # layer -> names of matrices in it


@runtime_checkable
class LayerPatterns(Protocol):
    """Gives every layer a pattern of its own; a frozen spec."""

    @property
    def mean(self) -> Pattern:
        """What a plan reckons with: all layers together keep as much, where they are alike."""
        ...

    def needs(self, matrices: Iterable[str]) -> tuple[Accumulator, ...]: ...

    def decide(
        self, stats: Statistics, model: DecoderLM, matrices: Matrices
    ) -> dict[int, Pattern]: ...


@spec
class OWL:
    """Layers of many outliers keep more: Outlier Weighed Layerwise sparsity (arXiv:2310.05175).

    D_l: the share of a layer's weights whose Wanda score |w_kn| ||X_k|| is above `outlier` times
    the mean of its matrix, of its expert where it has some. Densities rise linearly with D_l over
    2 spread, and their mean over layers is that of `mean`. 5 and 0.08 are the paper's for LLaMA.
    """

    mean: PerOutput | PerMatrix
    spread: float = 0.08
    outlier: float = 5.0

    def check(self) -> None:
        room = min(self.mean.sparsity, 1 - self.mean.sparsity) / 2
        fix = f"Use 0 for none, and less than {room:g} at a sparsity of {self.mean.sparsity:g}."
        check_that(0 <= self.spread < room or self.spread == 0, self, "spread", fix)
        check_that(self.outlier > 0, self, "outlier", "5 is usual.")

    def needs(self, matrices: Iterable[str]) -> tuple[Accumulator, ...]:
        found = (a for matrix in matrices for a in input_needs(matrix, Routed(), "OWL"))
        return tuple(dict.fromkeys(found))

    def decide(self, stats: Statistics, model: DecoderLM, matrices: Matrices) -> dict[int, Pattern]:
        blocks, shares = layers(model), []
        for layer, names in matrices.items():
            named, found = block_weights(blocks[layer]), []
            for name in names:
                inputs = matrix_inputs(name, stats.layers[layer], Routed(), "OWL")
                energy = np.diagonal(inputs.moments, axis1=-2, axis2=-1)
                found.append(np.asarray(_outliers(named[name], energy, self.outlier)).ravel())
            shares.append(np.concatenate(found).mean())
        share_L = np.asarray(shares, np.float64)
        width = np.ptp(share_L)
        rise_L = (share_L - share_L.min()) / width * 2 * self.spread if width > 0 else 0 * share_L
        sparsity_L = self.mean.sparsity - (rise_L - rise_L.mean())
        return {
            layer: dataclasses.replace(self.mean, sparsity=float(sparsity))
            for layer, sparsity in zip(matrices, sparsity_L, strict=True)
        }


@jax.jit
def _outliers(w: Array, energy: Array, times: float) -> Array:
    """The share of outliers in each matrix [*lead, K, N]; energy [*lead, K]: of its inputs."""
    score = jnp.abs(w) * jnp.sqrt(energy)[..., None]
    return jnp.mean(score > times * score.mean((-2, -1), keepdims=True), axis=(-2, -1))
