"""A model on a mesh: where its parameters lie, and that it computes what one device computes."""

import pytest

from moejax.core.axes import EMBED, HEADS, HIDDEN
from moejax.models import abstract_model, parameter_axes, parameters
from moejax.weights import shape
from tests.eight_devices import report_of
from tests.models.sharded_model import make_spec


@pytest.fixture(scope="module")
def report():
    return report_of("tests.models.sharded_model")


def test_a_model_on_a_mesh_is_the_model_on_one_device(report):
    """Catches losses, counts and router states of one device's tokens, copies of experts chosen by
    local token numbers, rules that see a part of a text, and rows that devices do not divide."""
    assert 0 < report["skipped"][0] < 60
    assert max(report["distances"].values()) < 1e-5, report["distances"]


def test_parameters_lie_where_the_rules_say(report):
    """Catches banks on every device, routers cut by expert, and tables or norms cut at all."""
    cut = report["cut"]
    bank = [[], ["node", "expert"], [], []]
    for name in ("gate", "up", "down"):
        assert cut[f"runs.1.moe.experts.{name}"] == bank
    whole = [name for name in cut if ".moe.experts." not in name]
    assert whole and not any(any(cut[name]) for name in whole)


def test_an_outline_gets_the_shardings_of_the_arrays(report):
    """Catches a plan of a pod that lies elsewhere than the model would."""
    assert report["outlined"]


def test_a_mesh_that_does_not_fit_the_model_is_refused(report):
    """Catches uneven banks that fail inside XLA: 8 divides neither experts nor their units."""
    assert report["refused"] == {"expert": "expert", "model": "model"}


def test_every_matrix_has_logical_axes():
    """Catches a matrix that no rule will ever cut because its name is not known."""
    for name, weight in parameters(abstract_model(make_spec())).items():
        inside = name.split(".", 2)[2] if name.startswith("layers.") else name
        axes = parameter_axes(inside, len(shape(weight)))
        assert len(axes) == len(shape(weight)), name
        large = [n for n in shape(weight) if n >= 8]
        if len(large) >= 2 and ".slots." not in name:
            assert {EMBED, HEADS, HIDDEN} & set(axes), name
