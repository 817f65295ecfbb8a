"""The page of pods."""

import pytest

from experiments.pods.__main__ import PODS, page
from moejax.config import load_config
from moejax.jobs.compile import Compile
from tests.jobs.test_compile import needs_libtpu

FACTS = {
    "topology": "v5e:16x16",
    "devices": 256,
    "hbm": 16e9,
    "mesh": "fsdp 16, expert 16",
    "strategy": "PaddedAllToAll()",
    "compiler": "libtpu",
    "steps": {
        "train": {
            "tokens": 4096,
            "memory": {"used": 17e9},
            "held": {"parameters": 1e9},
            "fits": False,
            "parts": [],
            "collectives": [],
            "advice": ["accumulate = 2."],
        }
    },
}


def test_page():
    """Fails where a step that does not fit stands in the table as if it did."""
    text = page({"olmoe_v5e_256": FACTS})
    assert "17.0 of 16: does not fit" in text and "- accumulate = 2." in text


@pytest.mark.parametrize("config", PODS)
def test_pod_configs_fit_their_mesh(config):
    """Fails where a pod config asks for a mesh that its topology or its model cannot have."""
    job = load_config(f"mesh/{config}").job()
    assert isinstance(job, Compile)
    for step in job.steps:
        assert step.program(job.model, job.parallel).tokens >= step.batch


@pytest.mark.pods
@needs_libtpu
@pytest.mark.parametrize("config", PODS)
def test_pods_fit_their_chips(config):
    """Fails where a change of the library takes a shipped pod out of its memory."""
    job = load_config(f"mesh/{config}").job()
    for step in job.steps:
        found = job.compiled(step)
        assert found["fits"], found["advice"]
        assert found["unknown_loops"] == []
