"""Prune, merge, low rank, quantize in one recipe: one ledger, one account, one saved model."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import load_model, payload_bytes, save_model
from moejax.compress import (
    AlignedByWeights,
    ExpertDrop,
    Frequency,
    HierarchicalClusters,
    LowRankResidual,
    MergeExperts,
    Quantize,
    ShareBase,
    account,
    check_recipe,
)
from moejax.core import SpecError
from moejax.evaluate import evaluate
from moejax.models import abstract_model, generate, parameters
from moejax.weights import Packed, SharedBase, SymmetricGrid
from tests.compress.conftest import EXPERTS, LAYERS, Source, apply, assert_same_weights

DROP = ExpertDrop(fraction=1 / 3, score=Frequency())
MERGE = MergeExperts(grouping=HierarchicalClusters(groups=2), alignment=AlignedByWeights())
LOW = ShareBase(residual=LowRankResidual(rank=4), matrices=("moe.experts.gate", "moe.experts.up"))
CODES = Quantize(grid=SymmetricGrid(bits=4, group=None), parameters="layers.*.moe.experts.down")
CHAIN = (DROP, MERGE, LOW, CODES)


@pytest.fixture(scope="module")
def chained(model, text):
    return apply(model, CHAIN, Source(text))


def test_one_ledger_holds_the_lineage_of_every_expert(chained):
    """Catches numbers that restart in a later pass, and lineages that forget an earlier one."""
    _, ledger = chained
    history = ledger.history("arm")
    assert history.keys() == {(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)}
    for layer in range(LAYERS):
        said = [history[layer, e] for e in range(EXPERTS)]
        assert sum(steps == ("ExpertDrop: dropped",) for steps in said) == 2
        stored = [e for e, steps in enumerate(said) if len(steps) == 4]
        assert len(stored) == 2
        for e in stored:
            names = [step.split(":")[0] for step in said[e]]
            assert names == ["ExpertDrop", "MergeExperts", "ShareBase", "Quantize"]
        into = {steps[1].split()[-1] for steps in said if "merged into" in steps[-1]}
        assert into <= {str(e) for e in stored}


def test_stored_bytes_are_the_common_budget(chained, model):
    """Catches a ledger, an account, a plan and a file that each count another size."""
    after, ledger = chained
    last = ledger.last("arm").values()
    outlined = abstract_model(model.spec)
    for step in CHAIN:
        outlined, _ = step.outline(outlined)
    by_row = sum(row.stored_bytes for row in last if not row.gone)
    assert by_row == account(after).expert_bytes == account(outlined).expert_bytes
    assert account(after).stored_bytes == payload_bytes(after, jnp.bfloat16)
    assert account(after).expert_bytes < account(model).expert_bytes / 4


def test_the_model_saves_loads_evaluates_and_generates(chained, text, tmp_path):
    """Catches slots, bases or codes that a manifest cannot name."""
    after, _ = chained
    save_model(tmp_path / "model", after, dtype=jnp.float32)
    again = load_model(tmp_path / "model")
    assert_same_weights(after, again)
    named = parameters(again)
    assert isinstance(named["layers.0.moe.experts.up"], SharedBase)
    assert isinstance(named["layers.0.moe.experts.down"], Packed)
    assert again.spec.layers[0].ffn.stored == 2 and again.spec.layers[0].ffn.experts == 4
    prompt = jnp.asarray(text[0].tokens_BxS[:2, :4])
    np.testing.assert_array_equal(generate(after, prompt, 3), generate(again, prompt, 3))
    scores = evaluate({"a": again}, text, base={}, group_bytes={"docs": 75})
    assert np.isfinite(scores["a"].average.perplexity)


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        ((CODES, MERGE), r"step 2 .*MergeExperts: layers.0.moe.experts.down .*Packed.*\n.*before"),
        ((LOW, MERGE), r"step 2 .*MergeExperts: layers.0.moe.experts.gate .*SharedBase"),
        ((CODES, LOW), r"step 2 .*ShareBase: layers.0.moe.experts.down .*Packed"),
        ((MERGE, DROP), r"step 2 .*ExpertDrop: .*slot map.*\n.*before merging"),
        ((DROP, DROP, DROP, DROP, MERGE), r"step \d .*ExpertDrop.* k = 2"),
    ],
)
def test_orders_that_cannot_work_are_refused_before_any_work(model, recipe, wrong):
    """Catches a pass that fails on what an earlier one made, after the hours that took."""
    with pytest.raises(SpecError, match=wrong):
        check_recipe(recipe, model)
