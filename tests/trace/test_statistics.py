import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.trace import (
    RoutingTrace,
    TraceLayout,
    affinity,
    coactivation,
    drift,
    lift,
    popularity,
    reuse_distances,
    statistics,
)
from tests.trace.traces import LAYOUT, random_rows, record


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    rows = random_rows(300)
    record(folder, rows)
    return RoutingTrace.open(folder), rows


@pytest.fixture(params=[1 << 24, 64])
def pieces(request, monkeypatch):
    """All rows at once, and a few at a time."""
    monkeypatch.setattr(statistics, "_COMPARISONS", request.param)


def _sets(rows, layer):
    return [[int(e) for e in token if e >= 0] for token in rows.expert_TxLxK[:, layer]]


def test_counts_equal_loops(recorded, pieces):
    """Catches -1 counted as the last expert, and pairs counted once per order or per piece."""
    trace, rows = recorded
    for group in (None, "prose"):
        wanted = np.zeros((2, 5), int)
        for layer in range(2):
            for number, token in enumerate(_sets(rows, layer)):
                if group is None or rows.group_T[number] == 1:
                    for e in token:
                        wanted[layer, e] += 1
        np.testing.assert_array_equal(popularity(trace, group), wanted)
    pairs, follows = np.zeros((2, 5, 5), int), np.zeros((1, 5, 5), int)
    for a, b in zip(_sets(rows, 0), _sets(rows, 1), strict=True):
        for layer, token in enumerate((a, b)):
            for e in token:
                for other in token:
                    pairs[layer, e, other] += 1
        for e in a:
            for other in b:
                follows[0, e, other] += 1
    np.testing.assert_array_equal(coactivation(trace), pairs)
    np.testing.assert_array_equal(affinity(trace), follows)


def test_reuse_distance_equals_an_lru_stack(recorded, pieces):
    """Catches distances in tokens, not in distinct experts, and state lost between pieces."""
    trace, rows = recorded
    wanted = np.zeros((2, 6), int)
    for layer in range(2):
        stack: list[int] = []
        for e in (e for token in _sets(rows, layer) for e in token):
            wanted[layer, stack.index(e) if e in stack else 5] += 1
            stack = [e, *(other for other in stack if other != e)]
    np.testing.assert_array_equal(reuse_distances(trace), wanted)


def test_drift_is_zero_for_equal_texts_and_one_for_disjoint_ones(tmp_path):
    """Catches a divergence in nats, and layers mixed up with groups."""
    rows = random_rows(4)._replace(group_T=np.array([0, 0, 1, 1], np.int16))
    rows.expert_TxLxK[:, 0, 0] = [0, 1, 0, 1]
    rows.expert_TxLxK[:, 1, 0] = [0, 0, 1, 2]
    rows.expert_TxLxK[:, :, 1] = -1
    record(tmp_path, rows)
    found = drift(RoutingTrace.open(tmp_path))
    np.testing.assert_allclose(found, [[[0, 0], [0, 0]], [[0, 1], [1, 0]]], atol=1e-12)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_divergence_is_at_most_one(seed):
    """Catches KL to the other text, which has no bound."""
    shares = np.random.default_rng(seed).dirichlet(np.full(5, 0.2), 2)
    middle = shares.mean(0)
    found = sum(statistics._relative(p, middle) for p in shares) / 2
    assert 0 <= found <= 1 + 1e-12


def test_lift_of_independent_choices_is_one(recorded):
    """Catches a lift that is not divided by both marginals."""
    first, second = np.array([10, 20]), np.array([5, 25])
    pairs = np.outer(first, second) / 40
    np.testing.assert_allclose(lift(pairs, 40, first, second), 1.0)
    assert np.isnan(lift(pairs, 40, np.array([0, 1]), second)[0]).all()


def test_a_trace_without_rows_counts_nothing(tmp_path):
    """Catches a crash on a run that was killed before its first flush."""
    record(tmp_path, random_rows(0), LAYOUT)
    trace = RoutingTrace.open(tmp_path)
    assert popularity(trace).sum() == reuse_distances(trace).sum() == 0
    assert coactivation(trace).shape == (2, 5, 5) and affinity(trace).shape == (1, 5, 5)
    assert TraceLayout.from_json(trace.layout.as_json()) == trace.layout
