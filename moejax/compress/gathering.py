"""What one dense feed-forward takes over from all experts of a layer: four gatherings, one expert.

A gathering gives the matrices of a student feed-forward as wide as one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.calibrate import Accumulator, Statistics
from moejax.compress.block_weights import EXPERTS, block_weights
from moejax.compress.expert_scores import ExpertScore, Frequency
from moejax.compress.grouping import expert_values
from moejax.core import check_that, keys, spec
from moejax.models import Block

MATRICES = ("gate", "up", "down")
Gathered = Mapping[str, Array]  # gate, up [D, F], down [F, D]


@runtime_checkable
class Gathering(Protocol):
    """Makes one feed-forward of a layer's experts."""

    def needs(self) -> tuple[Accumulator, ...]: ...

    def objection(self, experts: int, width: int, inputs: int) -> str | None:
        """What to mend where it cannot treat so many experts of width F on D inputs."""
        ...

    def __call__(self, layer: int, block: Block, stats: Statistics, key: Array) -> Gathered: ...


class _OfBanks:
    """Gatherings that read the weights alone."""

    def needs(self) -> tuple[Accumulator, ...]:
        return ()

    def objection(self, experts: int, width: int, inputs: int) -> str | None:
        return None


@spec
class SumOfExperts(_OfBanks):
    """W = sum_e W_e (OneS, arXiv:2201.10890, section 3.2: summation)."""

    def __call__(self, layer: int, block: Block, stats: Statistics, key: Array) -> Gathered:
        return {name: w.sum(0) for name, w in banks(block).items()}


@spec
class MeanOfExperts(_OfBanks):
    """W = mean_e W_e (OneS: averaging)."""

    def __call__(self, layer: int, block: Block, stats: Statistics, key: Array) -> Gathered:
        return {name: w.mean(0) for name, w in banks(block).items()}


@spec
class TopUnits(_OfBanks):
    """From each expert the F / E hidden units of largest norm (OneS: Top-KG).

    A unit is taken whole, with its columns of gate and up and its row of down; the first experts
    give one more where E does not divide F.
    """

    def objection(self, experts: int, width: int, inputs: int) -> str | None:
        if experts > width:
            return f"Top-K takes a unit of each of {experts} experts, which are {width} wide."
        return None

    def __call__(self, layer: int, block: Block, stats: Statistics, key: Array) -> Gathered:
        found = banks(block)
        norms_ExF = np.square(np.asarray(found["down"], np.float64)).sum(2)
        for name in ("gate", "up"):
            norms_ExF = norms_ExF + np.square(np.asarray(found[name], np.float64)).sum(1)
        E, F = norms_ExF.shape
        shares = [F // E + (e < F % E) for e in range(E)]
        best = np.argsort(-norms_ExF, axis=1, kind="stable")
        taken = [(e, np.sort(best[e, :share])) for e, share in enumerate(shares)]
        columns = {
            n: jnp.concatenate([found[n][e][:, u] for e, u in taken], 1) for n in ("gate", "up")
        }
        return {**columns, "down": jnp.concatenate([found["down"][e][u] for e, u in taken], 0)}


@spec
class SingularVectors(_OfBanks):
    """W = scale * sum_e of the best approximation of W_e of rank `rank` (OneS: SVD-KG).

    The kept factors side by side, [U_1 .. U_E] [S_1 V_1; ..; S_E V_E], are that sum. rank: None
    shares the smaller side of a matrix over the experts, so that the sum has full rank at most.
    The released figures do not say rank and scale; with equal experts at full rank it is
    scale * E times one of them.
    """

    rank: int | None = None
    scale: float = 1.0

    def check(self) -> None:
        check_that(self.rank is None or self.rank >= 1, self, "rank", "At least 1, or None.")
        check_that(self.scale > 0, self, "scale", "1 for the plain sum, 1 / E for the mean.")

    def objection(self, experts: int, width: int, inputs: int) -> str | None:
        most = min(width, inputs)
        if self.rank is not None and self.rank > most:
            return f"SingularVectors.rank = {self.rank} is above {most}, the rank of a matrix."
        return None

    def __call__(self, layer: int, block: Block, stats: Statistics, key: Array) -> Gathered:
        return {name: self._sum(w) for name, w in banks(block).items()}

    def _sum(self, w_ExKxN: Array) -> Array:
        E, K, N = w_ExKxN.shape
        rank = max(min(K, N) // E, 1) if self.rank is None else self.rank
        left, values, right = jnp.linalg.svd(w_ExKxN.astype(jnp.float32), full_matrices=False)
        kept = (left[..., :rank] * values[:, None, :rank], right[:, :rank])
        exact = jax.lax.Precision.HIGHEST
        return self.scale * jnp.einsum("ekr,ern->kn", *kept, precision=exact)


@spec
class OneExpert:
    """The expert of highest `score`, as it is (MoE-KD, MSR-TR-2022-6: the most used one)."""

    score: ExpertScore = Frequency()

    def needs(self) -> tuple[Accumulator, ...]:
        return self.score.needs()

    def objection(self, experts: int, width: int, inputs: int) -> str | None:
        return None

    def __call__(self, layer: int, block: Block, stats: Statistics, key: Array) -> Gathered:
        best = int(np.argmax(expert_values(self.score, layer, block, stats)))
        return {name: w[best] for name, w in banks(block).items()}


@spec
class DrawnAnew(_OfBanks):
    """Fresh weights of the size of an expert's: the student knows the other layers only.

    What Switch's students begin with (arXiv:2101.03961, section 4.1), and the control of a
    gathering. Normal, each matrix with the deviation of the experts'.
    """

    def __call__(self, layer: int, block: Block, stats: Statistics, key: Array) -> Gathered:
        return {
            name: jnp.std(w) * jax.random.normal(keys.fold(key, number), w.shape[1:], jnp.float32)
            for number, (name, w) in enumerate(banks(block).items())
        }


def banks(block: Block) -> dict[str, Array]:
    """gate, up [E, D, F] and down [E, F, D], plain arrays."""
    named = block_weights(block)
    return {name: named[EXPERTS + name] for name in MATRICES}
