"""What it costs to give an expert a grid: what an `Allocation` sums and keeps low."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from moejax import weights
from moejax.calibrate import (
    Accumulator,
    ByGroup,
    CoActivation,
    ExpertCounts,
    LayerInputs,
    LayerStatistics,
    ProbabilityMass,
)
from moejax.compress.block_weights import block_weights, expert_matrices
from moejax.compress.methods import Choice, FullPrecision
from moejax.compress.routed_error import routed_errors, stored_sums
from moejax.core import DataError, check_that, spec
from moejax.models import Block

Grids = Sequence[Choice]


@runtime_checkable
class Cost(Protocol):
    """The cost of every expert of a layer on every grid; lower is better, sums mean something."""

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]: ...

    def __call__(
        self, layer: int, block: Block, stats: LayerStatistics, grids: Grids
    ) -> np.ndarray:
        """float64 [E, B] of the E stored experts."""
        ...


@spec
class PMQCost:
    """phi_e^alpha w_e^beta eps_{e,b}^gamma (MC-MoE's PMQ, arXiv:2410.06270, eq. 4).

    phi: the expert's share of the routed tokens; w: its share of the gates before they are
    renormalised; eps: `routed_errors` on `tokens` inputs of the layer. The defaults are the
    paper's. Its released solver raises eps to alpha instead, which is gamma = 1 here.

    An expert that no token reached would cost nothing at any precision. It is taken for the least
    of those that were: phi and w are the smallest above zero in its layer, and where no cached
    input reaches it, eps is the smallest above zero on the same grid.

    eps already holds the tokens and gates of an expert, so that phi and w count them again: where
    frequent experts are not the ones that quantization hurts, `RoutedError` serves better.
    """

    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 2.0
    tokens: int = 2048

    def check(self) -> None:
        for field in ("alpha", "beta", "gamma"):
            check_that(getattr(self, field) >= 0, self, field, "Use 0 to leave the factor out.")
        check_that(self.tokens >= 1, self, "tokens", "2048 inputs per layer are usual.")

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        return (ExpertCounts(), ProbabilityMass(), LayerInputs(tokens=self.tokens))

    def __call__(
        self, layer: int, block: Block, stats: LayerStatistics, grids: Grids
    ) -> np.ndarray:
        phi_E = _shares(stored_sums(block, stats[ExpertCounts().name]))
        w_E = _shares(stored_sums(block, stats[ProbabilityMass().name]))
        inputs_TxD = stats[LayerInputs(tokens=self.tokens).name]
        error_ExB = measured_errors(layer, block, inputs_TxD, grids)
        significance_E = phi_E**self.alpha * w_E**self.beta
        return significance_E[:, None] * error_ExB**self.gamma


@spec
class RoutedError:
    """eps^2: the layer's squared output error alone, as if errors of experts did not meet.

    Already weighs an expert by its tokens and gates. Experts without a cached input are treated
    as by `PMQCost`.
    """

    tokens: int = 2048

    def check(self) -> None:
        check_that(self.tokens >= 1, self, "tokens", "2048 inputs per layer are usual.")

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        return (LayerInputs(tokens=self.tokens),)

    def __call__(
        self, layer: int, block: Block, stats: LayerStatistics, grids: Grids
    ) -> np.ndarray:
        inputs_TxD = stats[LayerInputs(tokens=self.tokens).name]
        return measured_errors(layer, block, inputs_TxD, grids) ** 2


@spec
class FrequencyCost:
    """phi_e 2^(-2 bits): the tokens of an expert times the error of a uniform grid; a control.

    Knows nothing of the weights. An expert without a token counts as the rarest of the others.
    """

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        return (ExpertCounts(),)

    def __call__(
        self, layer: int, block: Block, stats: LayerStatistics, grids: Grids
    ) -> np.ndarray:
        phi_E = _shares(stored_sums(block, stats[ExpertCounts().name]))
        return phi_E[:, None] * 4.0 ** -np.array([grid.bits for grid in grids])


@spec
class WeightError:
    """The squared relative error of the expert's matrices, their mean; needs no data."""

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        return ()

    def __call__(
        self, layer: int, block: Block, stats: LayerStatistics, grids: Grids
    ) -> np.ndarray:
        named, matrices = block_weights(block), expert_matrices(block)
        columns = []
        for grid in grids:
            squares = []
            for m in matrices:
                w = weights.materialize(named[m])
                near = w if isinstance(grid, FullPrecision) else grid(w, f"layers.{layer}.{m}")
                squares.append(np.asarray(weights.relative_error(w, near), np.float64) ** 2)
            columns.append(np.mean(squares, axis=0))
        return np.stack(columns, axis=1)


@spec
class MultiDomainCost:
    """sig_e eps_{e,b}, with the significance of an expert over several texts (MoQa, 2503.21135).

    With s_{e,d} = phi_{e,d} w_{e,d} of each domain, sig_e = mean_d s + spread std_d s: an expert
    that matters somewhere is kept, however large or small that domain is. To it comes
    coactivation times the mean significance of the experts that serve its tokens with it.
    The paper's formulas were not at hand; this follows its description.
    groups: names of the domains in the calibration text; eps is measured on inputs of all of them.
    An expert without a token is treated as by `PMQCost`.
    """

    groups: tuple[str, ...]
    spread: float = 1.0
    coactivation: float = 0.0
    tokens: int = 2048

    def check(self) -> None:
        distinct = len(set(self.groups)) == len(self.groups) >= 1
        check_that(distinct, self, "groups", "Name each domain once, and at least one.")
        for field in ("spread", "coactivation"):
            check_that(getattr(self, field) >= 0, self, field, "Use 0 to leave the term out.")
        check_that(self.tokens >= 1, self, "tokens", "2048 inputs per layer are usual.")

    def needs(self, grids: Grids) -> tuple[Accumulator, ...]:
        partners = (CoActivation(),) if self.coactivation else ()
        return (*self._by_group(), *partners, LayerInputs(tokens=self.tokens))

    def __call__(
        self, layer: int, block: Block, stats: LayerStatistics, grids: Grids
    ) -> np.ndarray:
        counts_DxE, mass_DxE = (stats[a.name] for a in self._by_group())
        for group, count_E in zip(self.groups, counts_DxE, strict=True):
            if not count_E.any():
                raise DataError(
                    f"MultiDomainCost.groups names {group!r}, of which no text was seen.",
                    "Calibrate on text of every group, or leave it out.",
                )
        domain_DxE = np.stack(
            [
                _normalised(stored_sums(block, count_E)) * _normalised(stored_sums(block, mass_E))
                for count_E, mass_E in zip(counts_DxE, mass_DxE, strict=True)
            ]
        )
        significance_E = domain_DxE.mean(0) + self.spread * domain_DxE.std(0)
        if self.coactivation:
            stored = functools.partial(stored_sums, block)
            together_ExE = np.array(stats[CoActivation().name], np.float64)
            for axis in (0, 1):
                together_ExE = np.apply_along_axis(stored, axis, together_ExE)
            np.fill_diagonal(together_ExE, 0)
            partners_ExE = together_ExE / np.maximum(together_ExE.sum(1, keepdims=True), 1)
            significance_E = significance_E + self.coactivation * partners_ExE @ significance_E
        inputs_TxD = stats[LayerInputs(tokens=self.tokens).name]
        error_ExB = measured_errors(layer, block, inputs_TxD, grids)
        return _floored(significance_E)[:, None] * error_ExB

    def _by_group(self) -> tuple[Accumulator, Accumulator]:
        return (
            ByGroup(of=ExpertCounts(), groups=self.groups),
            ByGroup(of=ProbabilityMass(), groups=self.groups),
        )


def measured_errors(layer: int, block: Block, inputs_TxD: np.ndarray, grids: Grids) -> np.ndarray:
    """`routed_errors` [E, B], for experts without an input the smallest above zero of each grid."""
    error_ExB, tokens_E = routed_errors(block, inputs_TxD, grids, layer=layer)
    seen_E = tokens_E > 0
    if seen_E.any():
        for b in range(len(grids)):
            positive = error_ExB[seen_E & (error_ExB[:, b] > 0), b]
            error_ExB[~seen_E, b] = positive.min() if positive.size else 0.0
    return error_ExB


def _normalised(value_E: np.ndarray) -> np.ndarray:
    """Sums to 1; all zero where all is."""
    total = value_E.sum()
    return value_E / total if total > 0 else value_E


def _floored(value_E: np.ndarray) -> np.ndarray:
    """Zeros replaced by the smallest value above; all ones where nothing is above."""
    positive = value_E[value_E > 0]
    return (
        np.where(value_E > 0, value_E, positive.min()) if positive.size else np.ones_like(value_E)
    )


def _shares(value_E: np.ndarray) -> np.ndarray:
    """Shares of a layer's total, those of unseen experts raised to the least of the others."""
    return _floored(_normalised(value_E))
