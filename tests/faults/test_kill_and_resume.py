"""A training run killed anywhere ends where the run that nobody killed ends, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint import read_manifest
from moejax.files import read_safetensors
from moejax.runs import FINISHED, INTERRUPTED, RunFolder, StudyResult, read_metrics
from tests.faults import tiny_run
from tests.faults.tiny_run import STEPS

ROOT = Path(__file__).parents[2]


@dataclass
class Death:
    """How a process ended: its status, and what it left."""

    step: int
    status: int
    output: str
    last_step: int
    steps_saved: list[int]
    has_model: bool
    run_status: str


def run_process(folder: Path, cache: Path, *fate: int) -> Death:
    """The run in a process of its own; all of them share their compiled programs."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "MOEJAX_CACHE": str(cache),
    }
    command = [sys.executable, tiny_run.__file__, str(folder), *map(str, fate)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    found = read_metrics(folder / "metrics.jsonl")
    saved = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    return Death(
        step=fate[0] if fate else STEPS,
        status=done.returncode,
        output=done.stdout + done.stderr,
        last_step=found[-1]["step"] if found else 0,
        steps_saved=sorted(saved),
        has_model=(folder / "model").exists(),
        run_status=RunFolder.open(folder).facts["status"],
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs):
    """A run that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEJAX_CACHE", str(runs / "cache"))
        tiny_run.run(runs / "whole")
    return runs / "whole"


@pytest.fixture(scope="module")
def deaths(runs, whole):
    """A run killed at three random steps, one of them while a checkpoint is being written; then
    asked to end by SIGTERM; then left to finish."""
    generator = random.Random(20)
    kills = [generator.randint(1, 13), 5 * generator.randint(4, 5) + 1, generator.randint(32, 43)]
    fates = [(step, signal.SIGKILL) for step in kills] + [(47, signal.SIGTERM), ()]
    return [run_process(runs / "killed", runs / "cache", *fate) for fate in fates]


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line that has one."""
    found = read_metrics(folder / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in found if "loss" in row]


def test_every_kill_struck_and_left_nothing_that_looks_whole(deaths):
    """Catches a model folder that exists before the end, and checkpoints lost with the process."""
    for death in deaths[:3]:
        assert death.status == -signal.SIGKILL, death.output
        assert death.last_step == death.step and not death.has_model
        # The checkpoint before the one that may have been in flight is there.
        assert death.steps_saved or death.step <= 6
        assert all(step > death.step - 11 for step in death.steps_saved[-1:])


def test_sigterm_saves_the_step_at_hand_and_exits(deaths):
    """Catches a run that dies of SIGTERM at once, or exits as if it had finished."""
    death = deaths[3]
    assert death.status == 128 + signal.SIGTERM, death.output
    assert death.run_status == INTERRUPTED and not death.has_model
    assert "Traceback" not in death.output
    assert death.steps_saved[-1] == death.last_step and death.last_step in (47, 48)


def test_the_resumed_run_ends_where_it_would_have(deaths, whole, runs):
    """Catches state that is not in the checkpoint: moments, router bias, data position, a random
    stream; a half-written checkpoint taken for whole; metrics that repeat or lose steps."""
    assert deaths[-1].status == 0, deaths[-1].output
    folder = runs / "killed"
    found = read_safetensors(folder / "model" / "model.safetensors")
    expected = read_safetensors(whole / "model" / "model.safetensors")
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert any(expected["layers.1.moe.router.selector.bias"] != 0)
    assert losses(folder) == losses(whole)
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    assert deaths[-1].run_status == FINISHED


def test_results_say_what_was_trained(whole):
    """Catches scores of another model than the one that was saved, groups left out, and a tokenizer
    whose reader must guess which token ends a document."""
    result = StudyResult.load(whole / "results.json")
    assert result.protocol["model"] == read_manifest(whole / "model").sha256
    assert [d.group for d in result.arms[0].domains] == ["a", "b"]
    assert result.arms[0].average.bits_per_byte < 8
    assert read_manifest(whole / "model").facts["tokens"] == STEPS * 4 * 16
    assert (whole / "model" / "tokenizer.json").is_file()
    config = (whole / "model" / "tokenizer_config.json").read_text()
    assert json.loads(config) == {"eos_token": "<|endoftext|>"}
