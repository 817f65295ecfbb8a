"""Two processes on loopback: they train what one trains, and fall and rise together."""

import os
import random
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.cli.main import main
from moejax.files import read_safetensors
from moejax.mesh.launcher import launch
from moejax.runs import FINISHED, INTERRUPTED, RunFolder, read_metrics
from tests.faults import mesh_run

ROOT = Path(__file__).parents[2]
STEPS, LONG = 8, 400


def launched(folder: Path, cache: Path, steps: int, *fate: int, grace: float = 60) -> int:
    """The status of a run in two processes of one device each."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MOEJAX_CACHE": str(cache),
    }
    words = [str(folder), str(steps), *map(str, fate)]
    command = [sys.executable, "-m", "tests.faults.mesh_run", *words]
    return launch(command, 2, environ=environment, grace_seconds=grace)


def losses(folder: Path) -> list[float]:
    found = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """The same run in one process, without a mesh."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEJAX_CACHE", str(cache))
        mesh_run.run(folder, STEPS, None)
    return folder


def test_two_processes_train_what_one_trains(alone, cache, tmp_path, capfd):
    """Catches rows that both processes read or none, lines written twice, gradients that are not
    summed over processes, and a model saved without the other process's experts."""
    folder = tmp_path / "run"
    assert launched(folder, cache, STEPS) == 0
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=1e-5)
    facts = RunFolder.open(folder).facts
    assert facts["status"] == FINISHED and facts["device"]["processes"] == 2
    assert saved(folder) == [4, 8]
    found = read_safetensors(folder / "model" / "model.safetensors")
    for name, array in read_safetensors(alone / "model" / "model.safetensors").items():
        np.testing.assert_allclose(found[name], array, atol=2e-4, err_msg=name)
    out = capfd.readouterr().out
    assert out.count("bits per byte on") == 1 and "[1] bits" not in out


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_resumes(cache, tmp_path, capfd):
    """Catches a launcher that waits for ever for the process that is left, a death unreported, and
    a checkpoint that counts as whole without the dead process's part."""
    whole = tmp_path / "whole"
    assert launched(whole, cache, 12) == 0
    folder = tmp_path / "run"
    status = launched(folder, cache, 12, 1, 7, signal.SIGKILL, grace=10)
    assert status == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by SIGKILL" in capfd.readouterr().err
    assert saved(folder) == [4] and not (folder / "model").exists()
    assert launched(folder, cache, 12) == 0
    assert losses(folder) == losses(whole)
    assert len(losses(folder)) == 12 and saved(folder) == [8, 12]
    found = read_safetensors(folder / "model" / "model.safetensors")
    for name, array in read_safetensors(whole / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.slow
def test_sigterm_to_one_saves_on_both(cache, tmp_path):
    """Catches processes that stop after different steps and save half a checkpoint each."""
    folder = tmp_path / "run"
    assert launched(folder, cache, LONG, 1, 5, signal.SIGTERM) == 128 + signal.SIGTERM
    last = len(losses(folder))
    assert 5 < last < LONG and saved(folder)[-1] == last
    assert RunFolder.open(folder).facts["status"] == INTERRUPTED
    assert not list((folder / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_the_nano_config_trains_in_two_processes(cache, tmp_path, monkeypatch):
    """Catches a command line that loses a binding on its way to the processes."""
    generator = random.Random(0)
    for group in ("a", "b"):
        (tmp_path / "text" / group).mkdir(parents=True)
        for number in range(40):
            words = generator.choices([f"{group}{n:x} word" for n in range(40)], k=200)
            (tmp_path / "text" / group / f"{number}.txt").write_text(" ".join(words))
    monkeypatch.setenv("MOEJAX_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    shorter = [
        "Train.corpus=@FolderCorpus()",
        f"FolderCorpus.path='{tmp_path / 'text'}'",
        "FolderCorpus.heldout_share=0.1",
        *("Train.steps=20", "Train.batch=8", "Train.length=32", "Train.evaluate_bytes=4000"),
    ]
    mesh = [
        *("Train.on=@OnMesh()", "OnMesh.mesh=@MeshSpec()", "MeshSpec.expert=-1"),
        "OnMesh.strategy=@PaddedAllToAll()",
    ]
    for name, bindings, more in (("one", shorter, []), ("two", shorter + mesh, ["--processes=2"])):
        sets = [word for binding in bindings for word in ("--set", binding)]
        assert main(["run", "train/nano", "--out", str(tmp_path / name), *sets, *more]) == 0
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert len(losses(tmp_path / "one")) == 20
