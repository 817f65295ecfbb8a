"""Training on a mesh gives what one device gives; eight devices want a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "XLA_FLAGS": flags,
    }
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    command = [sys.executable, "-m", "tests.train.on_mesh", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["padded", "ring, fsdp", "accumulated"])
def test_a_mesh_trains_what_one_device_trains(found, mesh):
    """Catches gradients summed over too many devices or too few, router losses and states of a
    device's own tokens, other first weights, and micro-batches of other rows."""
    said = found["training"][mesh]
    assert said["difference"] < 1e-4
    assert said["objective"] < 1e-5


@pytest.mark.parametrize("mesh", ["padded", "ring, fsdp"])
def test_the_state_is_cut_and_stays_where_it_was(found, mesh):
    """Catches moments that lie whole on every device, a state that moves from step to step, and
    buffers that are not given up."""
    said = found["training"][mesh]
    assert said["largest_share"] <= 1 / 4
    assert said["kept"] and said["donated"]


def test_what_was_dispatched_is_not_dispatched_again(found):
    """Catches a policy whose names no layer gives, so that the backward pass repeats exchanges."""
    assert found["exchanges"] == {"kept whole": 4, "dispatch": 4, "nothing": 6}


def test_a_checkpoint_restores_on_every_mesh(found):
    """Catches experts saved in the order of devices, and arrays that come back whole or shifted."""
    for mesh, said in found["checkpoints"].items():
        assert said["equal"] and said["placed"], mesh
        assert said["logits"] < 1e-6, mesh


def test_scores_on_a_mesh_are_those_of_one_device(found):
    """Catches windows scored on no device or on several, and counts of one device alone."""
    assert found["evaluation"]["bits"] < 1e-6
    assert found["evaluation"]["counts"] == [True, True]
