import jax.numpy as jnp
import numpy as np

from moejax.moe import Routing
from moejax.trace import RoutingTrace, TraceLayout, TraceRecorder, TraceWriter, chosen


def _routing(token, expert, gate, valid, tokens, experts, per_token):
    return Routing(
        jnp.asarray(token, jnp.int32),
        jnp.asarray(expert, jnp.int32),
        jnp.asarray(gate, jnp.float32),
        jnp.asarray(valid),
        jnp.zeros((tokens, experts)),
        jnp.zeros((tokens, experts)),
        per_token=per_token,
    )


def test_choices_of_lists_of_any_kind():
    """Catches choices that a rule took back, and lists of expert choice read as [T, K]."""
    top2 = _routing([0, 0, 1, 1], [2, 0, 1, 2], [0.7, 0.3, 0.6, 0.4], [1, 1, 1, 0], 2, 3, 2)
    listed = _routing([1, 0, 1, 0], [0, 1, 2, 2], [0.2, 0.5, 0.9, 0.1], [1, 1, 1, 0], 2, 3, None)
    expert, gate = chosen([None, top2, listed], choices=3)
    assert expert.tolist() == [[[2, 0, -1], [1, -1, -1]], [[1, -1, -1], [2, 0, -1]]]
    np.testing.assert_allclose(gate, [[[0.7, 0.3, 0], [0.5, 0, 0]], [[0.6, 0, 0], [0.9, 0.2, 0]]])


def test_batches_become_requests(tmp_path):
    """Catches padding rows that become requests, masked tokens kept, a last batch not written."""
    layout = TraceLayout("m", (0,), (4,), 1, ("a", "b"))
    tokens = np.arange(6).reshape(2, 3)
    expert = jnp.arange(6, dtype=jnp.int16).reshape(6, 1, 1) % 4
    gate = jnp.ones((6, 1, 1))
    with TraceRecorder(TraceWriter(tmp_path, layout)) as record:
        record.add(tokens, np.array([[1, 1, 1], [0, 0, 0]], bool), "b", (expert, gate))
        record.add(tokens, np.array([[1, 1, 0], [1, 1, 1]], bool), "a", (expert, gate))
    rows = RoutingTrace.open(tmp_path).rows()
    assert rows.request_T.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert rows.position_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert rows.token_T.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert rows.group_T.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert rows.expert_TxLxK[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 3, 0, 1]
