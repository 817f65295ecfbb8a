"""QuantMoE-Bench (arXiv:2406.08155): which parts of a MoE deserve four bits."""

import math
from fnmatch import fnmatch

import numpy as np
import pytest

from moejax.compress.patterns import parameter_shapes
from moejax.jobs.model_source import SavedModel
from tests.systems.running import run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("quantization/moe_quantization", tmp_path_factory.mktemp("bench"))


def test_the_most_frequent_experts_deserve_the_bits(ran):
    """Catches scores that are read in the wrong order."""
    random = [ran.damage(name) for name in ran.starting("two experts at random")]
    assert len(random) == 3
    assert ran.damage("two most frequent experts 4 bits") < np.mean(random)
    assert ran.damage("two most frequent experts 4 bits") < ran.damage("experts 2 bits")


def test_mean_bits_are_those_of_the_plan(ran):
    """Catches a plan that gives another number of experts four bits than it says."""
    shapes = parameter_shapes(SavedModel(path="reference").manifest().spec)
    attention, experts = (
        sum(math.prod(shape) for name, shape in shapes.items() if fnmatch(name, glob))
        for glob in ("*.attention.[qkvo]", "*.moe.experts.*")
    )
    for name, bits in {
        "experts 2 bits": 2,
        "two most frequent experts 4 bits": (2 * 4 + 14 * 2) / 16,
        "first layer 4 bits": 2.5,
        "last layer 4 bits": 2.5,
    }.items():
        mean = (4 * attention + bits * experts) / (attention + experts)
        assert ran.result.arm(name).code_bits == pytest.approx(mean)
