"""Metrics: appended, torn, cut, tracked."""

from __future__ import annotations

import json
import math
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import RunError
from moejax.runs import Metrics, TensorBoard, read_metrics


class Remembered:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.seen, self.closed = [], False

    def write(self, step, values):
        self.seen.append((step, values))

    def close(self):
        self.closed = True


def test_every_line_is_on_disk_when_write_returns(tmp_path):
    """Catches metrics that stay in a buffer until the run ends."""
    metrics = Metrics(tmp_path)
    metrics.write(3, loss=1.5)
    assert read_metrics(metrics.path) == [{"step": 3, "loss": 1.5}]
    metrics.close()


def test_numbers_of_numpy_and_jax_are_numbers(tmp_path):
    """Catches arrays written by their repr."""
    import jax.numpy as jnp

    with Metrics(tmp_path) as metrics:
        metrics.write(np.int64(1), a=np.float32(0.5), b=jnp.float32(2), load=np.ones(2), n=7)
    expected = {"step": 1, "a": 0.5, "b": 2.0, "load": [1.0, 1.0], "n": 7}
    assert read_metrics(metrics.path) == [expected]


def test_nan_and_infinity_are_json_and_come_back(tmp_path):
    """Catches NaN tokens, which are not JSON, and values that come back as text."""
    with Metrics(tmp_path) as metrics:
        metrics.write(0, a=math.nan, b=math.inf, c=-math.inf, load=[1.0, math.nan])

    def refuse(token):
        raise AssertionError(token)

    assert json.loads(metrics.path.read_text(), parse_constant=refuse)["a"] == "nan"
    (row,) = read_metrics(metrics.path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    assert math.isnan(row["load"][1])


def test_a_torn_last_line_is_left_out_and_then_overwritten(tmp_path):
    """Catches a crash in a write that makes all metrics unreadable, or glues two lines."""
    with Metrics(tmp_path) as metrics:
        metrics.write(0, loss=1.0)
    with metrics.path.open("ab") as file:
        file.write(b'{"step": 1, "lo')
    assert [row["step"] for row in read_metrics(metrics.path)] == [0]
    with Metrics(tmp_path) as metrics:
        metrics.write(1, loss=2.0)
    assert [row["loss"] for row in read_metrics(metrics.path)] == [1.0, 2.0]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    """Catches a reader that skips what it cannot read."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": x}\n{"step": 2}\n')
    with pytest.raises(RunError, match="line 2"):
        read_metrics(path)


@given(
    steps=st.lists(st.integers(0, 20), max_size=12).map(sorted),
    cut=st.integers(-1, 21),
)
@settings(max_examples=30, deadline=None)
def test_truncation_keeps_exactly_the_steps_up_to_it(tmp_path_factory, steps, cut):
    """Catches a resume that loses a step or writes one twice."""
    with Metrics(tmp_path_factory.mktemp("run")) as metrics:
        for step in steps:
            metrics.write(step, loss=float(step), bad=math.nan)
        metrics.truncate_after(cut)
        metrics.write(99)
    found = [row["step"] for row in read_metrics(metrics.path)]
    assert found == [*(step for step in steps if step <= cut), 99]


def test_a_full_disk_is_a_run_error_and_earlier_lines_stay(tmp_path):
    """Catches a full disk that costs the metrics of the whole run."""
    metrics = Metrics(tmp_path)
    metrics.write(0, loss=1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, hard))
    try:
        with pytest.raises(RunError, match="Free space"):
            metrics.write(1, text="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_metrics(metrics.path) == [{"step": 0, "loss": 1.0}]


def test_trackers_see_the_finite_numbers_only(tmp_path):
    """Catches text, lists and NaN sent to a tracker that plots scalars."""
    tracker = Remembered()
    with Metrics(tmp_path, [tracker]) as metrics:
        metrics.write(4, loss=1.0, bad=math.nan, name="x", load=[1.0], flag=True)
    assert tracker.seen == [(4, {"loss": 1.0})]
    assert tracker.closed


def test_tensorboard_writes_an_event_file(tmp_path):
    """Catches a tracker that accepts numbers and writes none."""
    pytest.importorskip("tensorboardX")
    with Metrics(tmp_path, [TensorBoard(tmp_path)]) as metrics:
        metrics.write(0, loss=0.123)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_a_missing_tensorboardx_says_what_to_install(tmp_path, monkeypatch):
    """Catches an ImportError with a traceback."""
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(RunError, match="pip install"):
        TensorBoard(tmp_path)
