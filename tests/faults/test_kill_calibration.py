"""A calibration killed in the middle goes on at its last finished layer, to the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moejax.calibrate import calibration
from tests.faults import tiny_calibration
from tests.faults.tiny_calibration import BATCHES, LAYERS

ROOT = Path(__file__).parents[2]
NEVER = 10**6
KILLED = 2 * BATCHES + 2  # in the middle of layer 2


def die(cache: Path, steps: int) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, tiny_calibration.__file__, str(cache), str(steps)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def contents(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    cache = tmp_path_factory.mktemp("whole")
    assert tiny_calibration.run(cache, NEVER) == LAYERS * BATCHES
    return contents(cache)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    cache = tmp_path_factory.mktemp("killed")
    done = die(cache, KILLED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return cache


def test_a_killed_calibration_goes_on_to_the_same_bits(whole, killed):
    """Catches a walk that begins anew, inputs of another layer, a program of other rounding, and
    a spool that stays behind."""
    left = contents(killed)
    assert sum(name.endswith(".safetensors") for name in left) == 2 * 3
    assert any(name.endswith("inputs-2.bin") for name in left)
    assert tiny_calibration.run(killed, NEVER) == 2 * BATCHES
    assert contents(killed) == whole


def test_a_layer_half_written_is_collected_whole(whole, tmp_path, monkeypatch):
    """Catches a resumed layer whose program, and so whose rounding, is another."""
    real, written = calibration.write_statistic, []

    def write(*args):
        written.append(args)
        if len(written) == 5:  # the second of three of layer 1
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "write_statistic", write)
        with pytest.raises(KeyboardInterrupt):
            tiny_calibration.run(tmp_path, NEVER)
    assert tiny_calibration.run(tmp_path, NEVER) == 3 * BATCHES
    assert contents(tmp_path) == whole
