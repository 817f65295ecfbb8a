"""A training run that is killed anywhere ends where the run that nobody killed ends, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint import read_manifest
from moejax.files import read_safetensors
from moejax.runs import FINISHED, INTERRUPTED, RunFolder, StudyResult, read_metrics

SCRIPT = Path(__file__).with_name("tiny_run.py")
ROOT = Path(__file__).parents[2]
STEPS = 120
PATIENCE = 300  # seconds, for a machine that does much else


def begin(folder: Path, cache: Path) -> subprocess.Popen:
    """The run in a process of its own; all of them share their compiled programs."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        "MOEJAX_CACHE": str(cache),
    }
    with (folder.parent / f"{folder.name}.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(folder: Path, cache: Path) -> None:
    """Runs to the end."""
    status = begin(folder, cache).wait(PATIENCE)
    assert status == 0, (folder.parent / f"{folder.name}.txt").read_text()[-3000:]


def signal_at(folder: Path, cache: Path, step: int, number: int) -> int:
    """Begins or resumes the run, sends the signal once metrics name `step`; the exit status."""
    process = begin(folder, cache)
    deadline = time.monotonic() + PATIENCE
    while last_step(folder) < step:
        assert process.poll() is None, (folder.parent / f"{folder.name}.txt").read_text()[-3000:]
        assert time.monotonic() < deadline, f"no step {step} within {PATIENCE} s"
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(PATIENCE)


def last_step(folder: Path) -> int:
    """The last step that metrics.jsonl holds, 0 for none."""
    found = read_metrics(folder / "metrics.jsonl")
    return found[-1]["step"] if found else 0


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line that has one."""
    found = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in found if "loss" in row]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(folder, cache)
    return folder


def assert_same_end(folder: Path, whole: Path) -> None:
    """Parameters, router state and all losses are equal, and the run is marked as finished."""
    found = read_safetensors(folder / "model" / "model.safetensors")
    expected = read_safetensors(whole / "model" / "model.safetensors")
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert any(expected["layers.1.moe.router.selector.bias"] != 0)
    assert losses(folder) == losses(whole)
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert RunFolder.open(folder).facts["status"] == FINISHED


def test_a_run_killed_three_times_ends_where_it_would_have(whole, cache, tmp_path):
    """Catches state that is not in the checkpoint: moments, router bias, data position, a random
    stream; a half-written checkpoint taken for whole; metrics that repeat or lose steps."""
    generator = random.Random(20)
    folder = tmp_path / "killed"
    for low, high in ((1, 20), (25, 50), (55, 85)):
        step = generator.randint(low, high)
        assert signal_at(folder, cache, step, signal.SIGKILL) == -signal.SIGKILL
        assert last_step(folder) < STEPS
        assert not (folder / "model").exists()
    finish(folder, cache)
    assert_same_end(folder, whole)


def test_sigterm_saves_the_step_at_hand_and_the_run_goes_on_from_there(whole, cache, tmp_path):
    """Catches a run that dies of SIGTERM at once, or exits as if it had finished."""
    folder = tmp_path / "terminated"
    status = signal_at(folder, cache, 10, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert RunFolder.open(folder).facts["status"] == INTERRUPTED
    saved = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert saved == last_step(folder) >= 10
    assert not (folder / "model").exists()
    finish(folder, cache)
    assert_same_end(folder, whole)


def test_results_say_what_was_trained(whole):
    """Catches scores of another model than the one that was saved, and groups left out."""
    result = StudyResult.load(whole / "results.json")
    assert result.protocol["model"] == read_manifest(whole / "model").sha256
    assert [d.group for d in result.arms[0].domains] == ["a", "b"]
    assert result.arms[0].average.bits_per_byte < 8
    assert read_manifest(whole / "model").facts["tokens"] == STEPS * 4 * 16
    assert (whole / "model" / "tokenizer.json").is_file()
