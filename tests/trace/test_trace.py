import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.core import DataError, RunError
from moejax.trace import RoutingTrace, TraceLayout, TraceRows, TraceWriter
from tests.trace.traces import LAYOUT, random_rows, record


def _same(a: TraceRows, b: TraceRows) -> None:
    for mine, theirs in zip(a, b, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype


@pytest.mark.parametrize("piece", [1, 7, 4096, 5000])
def test_rows_come_back_however_they_were_appended(tmp_path, piece):
    """Catches rows lost or doubled where a chunk is cut, and a chunk overwritten by its tail."""
    rows = random_rows(9000 if piece > 1 else 40)
    with TraceWriter(tmp_path, LAYOUT, flush_rows=3000) as writer:
        for start in range(0, len(rows.request_T), piece):
            writer.append(TraceRows(*(column[start : start + piece] for column in rows)))
    trace = RoutingTrace.open(tmp_path)
    part = trace.column("expert", 3, 20, layer=1)
    assert len(trace) == len(rows.request_T)
    _same(trace.rows(), rows)
    _same(TraceRows(*map(np.concatenate, zip(*trace.batches(1234), strict=True))), rows)
    np.testing.assert_array_equal(part, rows.expert_TxLxK[3:20, 1])


def test_it_is_read_while_it_is_written_and_taken_up_again(tmp_path):
    """Catches a reader that sees rows too early, and a second writer that begins at zero."""
    writer = TraceWriter(tmp_path, LAYOUT)
    writer.append(random_rows(10, seed=1))
    assert len(RoutingTrace.open(tmp_path)) == 0 and len(writer) == 10
    writer.flush()
    early = RoutingTrace.open(tmp_path)
    writer.append(random_rows(5000, seed=2))
    writer.flush()
    _same(early.rows(), random_rows(10, seed=1))
    with TraceWriter(tmp_path, LAYOUT) as again:
        again.append(random_rows(3, seed=3))
    trace = RoutingTrace.open(tmp_path)
    assert len(trace) == 5013
    _same(trace.rows(5010), random_rows(3, seed=3))


def test_a_kill_loses_nothing_that_was_flushed(tmp_path):
    """Catches a count written before its rows, and rows that a half-written chunk takes along."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.trace.traces", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(3)]
    child.send_signal(signal.SIGKILL)
    said += child.stdout.readlines()
    child.wait()
    trace = RoutingTrace.open(tmp_path)
    flushed = int([line for line in said if line.endswith("\n")][-1])
    assert len(trace) >= flushed * 1000 + (flushed - 1) * 999
    for number in range(flushed):
        start = number * 1999
        _same(trace.rows(start, start + 1000), random_rows(1000, seed=number))
    with TraceWriter(tmp_path, LAYOUT) as writer:
        writer.append(random_rows(10, seed=99))
    _same(RoutingTrace.open(tmp_path).rows(len(trace)), random_rows(10, seed=99))


def test_steps_are_what_ran_at_once(tmp_path):
    """Catches a text cut at a piece's edge, and requests decoded together told apart."""
    rows = random_rows(6)._replace(
        request_T=np.array([0, 0, 1, 0, 1, 0], np.int32),
        phase_T=np.array([0, 0, 0, 1, 1, 1], np.uint8),
        step_T=np.array([0, 0, 0, 1, 1, 2], np.int32),
    )
    record(tmp_path, rows)
    assert [len(step.request_T) for step in RoutingTrace.open(tmp_path).steps()] == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request_T": np.zeros(3, np.int32)}, "shape"),
        ({"gate_TxLxK": np.zeros((4, 2, 3), np.float32)}, "'gate' has shape"),
        ({"token_T": np.zeros(4)}, "float64"),
        ({"expert_TxLxK": np.full((4, 2, 2), 3, np.int16)}, "beyond"),
        ({"gate_TxLxK": np.full((4, 2, 2), np.nan, np.float32)}, "not finite"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, change, message):
    """Catches experts of one layer's range accepted in a smaller layer, and silent casts."""
    with (
        pytest.raises(DataError, match=message),
        TraceWriter(tmp_path, LAYOUT) as writer,
    ):
        writer.append(random_rows(4)._replace(**change))
    assert len(RoutingTrace.open(tmp_path)) == 0


def test_other_models_layouts_and_folders_are_refused(tmp_path):
    """Catches replaying a trace of another model, and appending to one of another shape."""
    record(tmp_path / "a", random_rows(4))
    RoutingTrace.open(tmp_path / "a", model="abc")
    with pytest.raises(DataError, match="not of xyz"):
        RoutingTrace.open(tmp_path / "a", model="xyz")
    with pytest.raises(DataError, match="choices is 2, not 3"):
        TraceWriter(tmp_path / "a", TraceLayout("abc", (1, 3), (5, 3), 3, ("code", "prose")))
    with pytest.raises(DataError, match="no readable routing trace"):
        RoutingTrace.open(tmp_path)
    with pytest.raises(DataError, match="cannot be recorded"):
        TraceWriter(tmp_path / "b", TraceLayout("abc", (), (), 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        TraceWriter(tmp_path / "file", LAYOUT)


def test_a_damaged_chunk_is_named(tmp_path):
    """Catches a raw error of the storage library, or zeros instead of one."""
    record(tmp_path, random_rows(4))
    chunk = next(path for path in (tmp_path / "expert" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(DataError, match="expert of a trace cannot be read"):
        RoutingTrace.open(tmp_path).rows()


def test_a_full_disk_stops_with_the_folder_s_name(tmp_path):
    """Catches a flush that says nothing when a chunk could not be written."""
    writer = TraceWriter(tmp_path, LAYOUT)
    writer.append(random_rows(10, seed=1))
    writer.flush()
    for column in ("expert", "gate"):
        for path in (tmp_path / column / "c").rglob("*"):
            if path.is_file():
                path.unlink()
                path.mkdir()  # where a file should go: what can be done to root, too
    writer.append(random_rows(10, seed=2))
    with pytest.raises(RunError, match="cannot be written"):
        writer.flush()
