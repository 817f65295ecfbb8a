"""Hidden units put in one order: by assignment to another expert, and their common centre.

An expert is a set of hidden units, each a point: the numbers that go into and out of it. The order
of the units means nothing, so two experts are compared unit by unit only after one is reordered.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from moejax.core.errors import SpecError


def align(units_FxP: np.ndarray, to_FxP: np.ndarray) -> np.ndarray:
    """order_F, a permutation: `units_FxP[order_F]` is as near to `to_FxP` as an order can bring it.

    The least sum over units of |to_i - units_order(i)|^2, exactly (the Hungarian method; aligned
    merging in MC-SMoE, arXiv:2310.01334, section 3.1). Between uniform measures of as many points
    it is the optimal transport. SpecError for experts of different shapes, or with NaN.
    """
    if units_FxP.shape != to_FxP.shape:
        raise SpecError(
            f"experts of shapes {units_FxP.shape} and {to_FxP.shape} (units, numbers per unit) "
            "cannot be aligned.",
            "Merge experts of one width; narrow the wider ones first.",
        )
    # |a - b|^2 = |a|^2 + |b|^2 - 2 ab, and the squares do not depend on the order.
    gain_FxF = np.asarray(to_FxP, np.float64) @ np.asarray(units_FxP, np.float64).T
    if not np.isfinite(gain_FxF).all():
        raise SpecError(
            "hidden units with NaN or infinite weights cannot be aligned.",
            "The model is damaged: load it anew.",
        )
    return linear_sum_assignment(gain_FxF, maximize=True)[1]


def barycentre(units_ExFxP: np.ndarray, rounds: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """(centre_FxP, order_ExF): the Wasserstein barycentre of experts, and their units in its order.

    The free-support barycentre of E uniform measures of F points (arXiv:2503.06881, section 4;
    algorithm 2 of arXiv:1310.4375 with a full step), started at the first expert: transport every
    expert onto the centre, move each point of the centre to the mean of what came to it, until no
    assignment changes or for `rounds` rounds. sum_e |units_e[order_e] - centre|^2 never grows.
    """
    centre_FxP = np.asarray(units_ExFxP[0], np.float64)
    order_ExF: np.ndarray | None = None
    for _ in range(rounds):
        found_ExF = np.stack([align(units_FxP, centre_FxP) for units_FxP in units_ExFxP])
        if order_ExF is not None and np.array_equal(found_ExF, order_ExF):
            break
        order_ExF = found_ExF
        aligned = np.take_along_axis(np.asarray(units_ExFxP, np.float64), found_ExF[..., None], 1)
        centre_FxP = aligned.mean(0)
    assert order_ExF is not None
    return centre_FxP, order_ExF
