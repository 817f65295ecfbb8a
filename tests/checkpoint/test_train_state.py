"""Training checkpoints: exact, retained by rule, whole or absent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.checkpoint import TrainCheckpoints
from moejax.core import CheckpointError, RunError


def state_of(step):
    trainable = {"runs.0.q": jnp.full((3, 4), step, jnp.float32), "embed": jnp.arange(5.0) * step}
    return {
        "step": jnp.int32(step),
        "trainable": trainable,
        "frozen": {"bias": jnp.full(2, step, jnp.bfloat16), "words": jnp.uint32([step, 2**32 - 1])},
        "optimizer": optax.adamw(1e-3).init(trainable),
    }


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_donating_the_state_after_a_save_does_not_change_what_is_saved(tmp_path):
    """Catches an asynchronous save that still reads buffers the next step writes into."""
    change = jax.jit(lambda s: jax.tree.map(lambda a: a + jnp.ones_like(a), s), donate_argnums=0)
    expected = state_of(3)
    with TrainCheckpoints(tmp_path) as checkpoints:
        state = state_of(3)
        checkpoints.save(3, state, {"data": {"row": 7}})
        for _ in range(3):
            state = change(state)
        checkpoints.wait()
        step, found, position = checkpoints.restore_latest(state_of(0))
    assert step == 3 and position == {"data": {"row": 7}}
    assert_equal(found, expected)


def test_keeps_the_last_and_the_best(tmp_path):
    """Catches retention by age alone, or that takes the highest bits per byte for the best."""
    metrics = [5.0, 2.0, 4.0, None, 3.0, None]
    with TrainCheckpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, metric in enumerate(metrics):
            checkpoints.save(step, state_of(step), {}, metric)
        checkpoints.wait()
        assert checkpoints.steps() == (1, 4, 5)
        assert checkpoints.best_step() == 1
        assert_equal(checkpoints.restore(1, state_of(0))[0], state_of(1))
        assert checkpoints.restore_latest(state_of(0))[0] == 5


def test_an_empty_folder_restores_nothing(tmp_path):
    """Catches a first run that fails for want of a checkpoint."""
    with TrainCheckpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_latest(state_of(0)) is None
        assert checkpoints.best_step() is None


def test_another_model_is_refused(tmp_path):
    """Catches a restore that pads, cuts or leaves out arrays of another shape."""
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        checkpoints.wait()
        other = state_of(0)
        other["trainable"]["embed"] = jnp.zeros(6)
        with pytest.raises(CheckpointError, match="step 1"):
            checkpoints.restore_latest(other)
        del other["trainable"]["embed"]
        with pytest.raises(CheckpointError, match="step 1"):
            checkpoints.restore_latest(other)


def test_a_damaged_checkpoint_is_named_and_the_one_before_still_restores(tmp_path):
    """Catches damage reported as a traceback of TensorStore, or zeros in place of lost chunks."""
    with TrainCheckpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        checkpoints.save(2, state_of(2), {})
    for chunk in (tmp_path / "2" / "state").rglob("d/*"):
        chunk.write_bytes(chunk.read_bytes()[:3])
    with TrainCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="step 2"):
            checkpoints.restore_latest(state_of(0))
        assert_equal(checkpoints.restore(1, state_of(0))[0], state_of(1))


def test_keep_nothing_is_refused(tmp_path):
    """Catches a run that deletes the checkpoint it would have to resume from."""
    with pytest.raises(RunError, match="keep_last = 0"):
        TrainCheckpoints(tmp_path, keep_last=0)


SAVE_FOREVER = """
import sys, jax.numpy as jnp
from moejax.checkpoint import TrainCheckpoints
checkpoints = TrainCheckpoints(sys.argv[1], keep_last=2)
for step in range(1, 10**6):
    checkpoints.save(step, {"a": jnp.full(2**16, step, jnp.float32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("after", [2, 5])
def test_kill_in_the_middle_of_saves_leaves_a_whole_checkpoint(tmp_path, after):
    """Catches checkpoints that count as latest before all of their arrays are on disk."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, f"{root}/kernels"])
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == after:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    with TrainCheckpoints(tmp_path, keep_last=2) as checkpoints:
        step, found, position = checkpoints.restore_latest({"a": jnp.zeros(2**16)})
        assert step >= after - 1 and position == {"step": step}
        assert (np.asarray(found["a"]) == step).all()
        checkpoints.save(step + 1, found, {})
        checkpoints.wait()
        assert checkpoints.steps()[-1] == step + 1
    assert not list(tmp_path.glob("*tmp*"))
