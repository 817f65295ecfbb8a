"""PEMPE's score: what fine-tuning made of router rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import ExpertDrop
from moejax.core import SpecError
from moejax.jobs.model_source import SavedModel
from moejax.jobs.router_change import RouterChange
from moejax.models import layers, parameters, select_experts, with_parameters
from tests.compress.conftest import Source, apply
from tests.evaluate.conftest import cut, make_tokens

KERNEL = "layers.{}.moe.router.scores.kernel"


@pytest.fixture(scope="module")
def before(saved):
    return SavedModel(path=saved["moe"])


@pytest.fixture(scope="module")
def model(before):
    return before.load(jnp.bfloat16)


def tuned(model, scale_E, turned=()):
    """The model with router rows scaled, some of them turned round as well."""
    named = dict(parameters(model))
    sign_E = np.where(np.isin(np.arange(4), turned), -1, 1)
    for layer in range(2):
        named[KERNEL.format(layer)] *= jnp.asarray(scale_E * sign_E)
    return with_parameters(model.spec, named)


def test_rows_that_changed_least_go_first(model, before):
    """Catches the size of a row instead of its growth, and the largest change dropped."""
    after = tuned(model, np.array([1.5, 1.0, 2.0, 1.1]))
    step = ExpertDrop(fraction=0.5, score=RouterChange(before=before))
    _, ledger = apply(after, [step], Source(cut({"docs": make_tokens(75)}, 5)))
    kept = {(row.layer, row.expert) for row in ledger if not row.dropped}
    assert kept == {(layer, expert) for layer in range(2) for expert in (0, 2)}


def test_a_turned_row_has_changed_though_its_norm_has_not(model, before):
    """Catches two ways of measuring change that are one: the values are those of the formulas."""
    after = tuned(model, np.ones(4), turned=(1,))
    block = layers(after)[1]
    norm = np.linalg.norm(np.asarray(parameters(model)[KERNEL.format(1)], np.float64), axis=0)
    np.testing.assert_allclose(RouterChange(before=before)(1, block, {}), 0, atol=1e-12)
    found = RouterChange(before=before, of="row")(1, block, {})
    np.testing.assert_allclose(found, [0, 2 * norm[1], 0, 0], atol=1e-12)


def test_other_experts_than_before_are_refused(model, before):
    """Catches rows compared by number after some have gone."""
    block = select_experts(layers(model)[0], (0, 1, 3))
    with pytest.raises(SpecError, match=r"router of layer 0 has 3 rows .* has 4.*\n.*fine-tuned"):
        RouterChange(before=before)(0, block, {})
