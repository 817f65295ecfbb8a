"""What a routing trace says of the experts: how often, how soon again, with whom, for what text.

All read the trace in pieces. Shapes: L traced layers, E the most experts of a layer; an expert that
a layer does not have counts zero.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moejax.trace.layout import TraceRows
from moejax.trace.reader import RoutingTrace

_COMPARISONS = 1 << 24  # booleans made at once


def popularity(trace: RoutingTrace, group: str | None = None) -> np.ndarray:
    """int64 [L, E]: tokens that chose the expert, of one group's text or of all."""
    number = None if group is None else trace.layout.groups.index(group)

    def count(rows: TraceRows) -> np.ndarray:
        expert_TxLxK = rows.expert_TxLxK
        if number is not None:
            expert_TxLxK = expert_TxLxK[rows.group_T == number]
        return _marks(expert_TxLxK, _most(trace)).sum(0, dtype=np.int64)

    return _summed(trace, count)


def coactivation(trace: RoutingTrace) -> np.ndarray:
    """int64 [L, E, E]: tokens that chose both experts in a layer; the diagonal is `popularity`."""

    def count(rows: TraceRows) -> np.ndarray:
        marks_LxTxE = _marks(rows.expert_TxLxK, _most(trace)).swapaxes(0, 1).astype(np.float32)
        return np.rint(marks_LxTxE.mT @ marks_LxTxE).astype(np.int64)

    return _summed(trace, count)


def affinity(trace: RoutingTrace) -> np.ndarray:
    """int64 [L - 1, E, E]: tokens that chose e in a layer and e' in the next traced one.

    Inter-layer affinity (ExFlow, arXiv:2401.08383); divided by its row sums, the chance of e'.
    """

    def count(rows: TraceRows) -> np.ndarray:
        marks_LxTxE = _marks(rows.expert_TxLxK, _most(trace)).swapaxes(0, 1).astype(np.float32)
        return np.rint(marks_LxTxE[:-1].mT @ marks_LxTxE[1:]).astype(np.int64)

    return _summed(trace, count)


def lift(pairs: np.ndarray, tokens: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64, P(e, e') / (P(e) P(e')) of pair counts [..., E, E]; 1 means independent.

    first, second: counts [..., E] of the rows' and columns' experts; nan where one is zero.
    """
    expected = first[..., :, None].astype(np.float64) * second[..., None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, pairs * float(tokens) / expected, np.nan)


def reuse_distances(trace: RoutingTrace) -> np.ndarray:
    """int64 [L, E + 1]: how often so many other experts of the layer were used since the last use.

    The LRU stack distance, tokens taken one at a time in the trace's order: a cache of C experts
    that drops the least recently used hits every use at a distance below C. Experts of one token
    are used in the order of its choices. In column E: first uses.
    """
    most, layers = _most(trace), len(trace.layout.layers)
    found = np.zeros((layers, most + 1), np.int64)
    last_LxE = np.full((layers, most), -1, np.int64)
    uses = 0
    for rows in trace.batches(max(1, _COMPARISONS // (16 * most))):
        T, _, K = rows.expert_TxLxK.shape
        for layer in range(layers):
            expert_TxK = rows.expert_TxLxK[:, layer].astype(np.int64)
            distance_U, last_LxE[layer] = _distances(expert_TxK, last_LxE[layer], uses)
            found[layer] += np.bincount(distance_U, minlength=most + 1)
        uses += T * K
    return found


def _distances(
    expert_TxK: np.ndarray, last_E: np.ndarray, uses: int
) -> tuple[np.ndarray, np.ndarray]:
    """Stack distance of every use, E for a first one; and when each expert was last used."""
    T, K = expert_TxK.shape
    E = len(last_E)
    expert_U = expert_TxK.reshape(-1)
    time_U = uses + np.arange(T * K)
    there_U = expert_U >= 0
    expert_U, time_U = expert_U[there_U], time_U[there_U]
    # before[u, e]: the last use of e before use u.
    stamped = np.full((len(expert_U) + 1, E), -1, np.int64)
    stamped[0] = last_E
    stamped[1 + np.arange(len(expert_U)), expert_U] = time_U
    before = np.maximum.accumulate(stamped, axis=0)
    own_U = before[np.arange(len(expert_U)), expert_U]
    distance_U = (before[:-1] > own_U[:, None]).sum(1)
    return np.where(own_U < 0, E, distance_U), before[-1]


def drift(trace: RoutingTrace) -> np.ndarray:
    """float64 [L, G, G]: Jensen-Shannon divergence in bits of the groups' popularities.

    0 for groups whose text uses the experts alike, 1 for groups that share none; nan for a group
    without rows.
    """
    share_GxLxE = np.stack(
        [popularity(trace, group).astype(np.float64) for group in trace.layout.groups]
    )
    with np.errstate(invalid="ignore"):
        share_GxLxE /= share_GxLxE.sum(-1, keepdims=True)
    p, q = share_GxLxE[:, None], share_GxLxE[None]
    middle = (p + q) / 2
    return np.moveaxis((_relative(p, middle) + _relative(q, middle)) / 2, 2, 0)


def _relative(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in bits over the last axis; 0 log 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p == 0, 0.0, p * np.log2(p / q))
    return terms.sum(-1)


def _marks(expert_TxLxK: np.ndarray, experts: int) -> np.ndarray:
    """bool [T, L, E]: whether the token chose the expert."""
    T, L, _ = expert_TxLxK.shape
    marks = np.zeros((T, L, experts + 1), bool)  # the last column takes the -1
    np.put_along_axis(marks, expert_TxLxK.astype(np.int64) % (experts + 1), True, axis=2)
    return marks[..., :experts]


def _summed(trace: RoutingTrace, count: Callable[[TraceRows], np.ndarray]) -> np.ndarray:
    """Rows few enough at a time that their marks stay small."""
    size = max(1, _COMPARISONS // (len(trace.layout.layers) * _most(trace)))
    parts = [count(rows) for rows in trace.batches(size)]
    if not parts:
        empty = np.zeros((0, len(trace.layout.layers), trace.layout.choices), np.int16)
        return count(trace.rows(0, 0)._replace(expert_TxLxK=empty))
    return sum(parts[1:], parts[0])


def _most(trace: RoutingTrace) -> int:
    return max(trace.layout.experts)
