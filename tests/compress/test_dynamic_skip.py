"""Dynamic skipping: thresholds from calibration, in recipes and in plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.calibrate import Calibration, ExpertCounts, GateRatios, SecondMoments
from moejax.compress import DynamicSkip, Pass, check_recipe
from moejax.core import SpecError, from_json, to_json
from moejax.models import layers, parameters, with_layers, with_parameters, with_rule
from moejax.moe import Protection, RandomImportance, SkipSmallGates
from tests.compress.conftest import FOUR_BITS, Source, apply
from tests.evaluate.conftest import cut, dense, make_model, make_spec, make_tokens, routed, run

ODP = SkipSmallGates(protect=Protection(share=0.02))
SEEN = 63  # the token id that `attended` looks at


@pytest.fixture(scope="module")
def text():
    """Some 1600 tokens: one percent is 16 of them."""
    return cut({"docs": make_tokens(1600)}, 50)


@pytest.fixture(scope="module")
def stats(model, text):
    return Calibration(text)(model, (GateRatios(), ExpertCounts()))


def treated(model, stats, step):
    """The model after the pass alone."""
    plan = step.decide(stats, model)
    key = jax.random.key(0)
    edits = [
        step.apply_layer(i, block, plan, stats.layers[i], key)
        for i, block in enumerate(layers(model))
    ]
    assert not any(edit.matrices for edit in edits)
    return with_layers(model, [edit.block for edit in edits])


def skipped(model, text, layer):
    """The share of tokens that lose their second expert, from the model itself."""
    lost = tokens = 0
    for batch in text:
        valid_TxK = np.asarray(run(model, batch).routings[layer].valid_A).reshape(-1, 2)
        mask_T = batch.mask_BxS.reshape(-1)
        assert valid_TxK[mask_T].any(1).all()
        lost += int((valid_TxK[mask_T].sum(1) == 1).sum())
        tokens += int(mask_T.sum())
    return lost / tokens


@pytest.mark.parametrize(("layer", "quantile"), [(0, 0.5), (1, 0.5), (1, 0.2)])
def test_the_quantile_is_the_share_that_is_skipped(model, text, stats, layer, quantile):
    """Catches a median of gates or of logits, and a threshold of another layer."""
    step = DynamicSkip(quantile=quantile, layers=(layer,))
    after = treated(model, stats, step)
    assert abs(skipped(after, text, layer) - quantile) <= 0.01
    assert skipped(after, text, 1 - layer) == 0


def test_beta_is_the_quantile_of_the_ratio_of_gates(model, text, stats):
    """Catches g_1 / g_2, ratios of padding, and a histogram read at its edges."""
    plan = DynamicSkip().decide(stats, model)
    for layer in (0, 1):
        ratios = []
        for batch in text:
            routing = run(model, batch).routings[layer]
            gate_TxK = np.sort(np.asarray(routing.gate_A).reshape(-1, 2), axis=1)
            ratios.append((gate_TxK[:, 0] / gate_TxK[:, 1])[batch.mask_BxS.reshape(-1)])
        assert abs(plan[layer] - np.median(np.concatenate(ratios))) < 2e-3


def test_protection_keeps_experts_of_two_percent(model, text, stats):
    """Catches protection that is dropped on the way from the pass into the model."""
    alone, protected = (
        skipped(treated(model, stats, DynamicSkip(layers=(0,), rule=rule)), text, 0)
        for rule in (SkipSmallGates(), ODP)
    )
    # One token of each window of 16 is protected, and about half of them were skipped.
    assert 0.01 < alone - protected <= 1 / 16


@pytest.fixture(scope="module")
def attended(model):
    """A model that attends to one token id almost alone, and each window with one such token."""
    named = {name: np.array(weight) for name, weight in parameters(model).items()}
    named["embed"][:, :2] = 0
    named["embed"][:, 0], named["embed"][SEEN, 1] = 2, 2
    for layer in (0, 1):
        # In the slowest rotary pair, queries read what all tokens share, keys what one has.
        for name, row in (("q", 0), ("k", 1)):
            projection = named[f"layers.{layer}.attention.{name}"]
            projection[:] = 0
            projection[row, 3::8] = 4
    (batch,) = cut({"docs": make_tokens(800) % SEEN}, 50)
    rng = np.random.default_rng(0)
    batch.tokens_BxS[np.arange(50), rng.integers(1, 6, 50)] = SEEN
    return with_parameters(model.spec, {n: jnp.asarray(w) for n, w in named.items()}), batch


def divergence(attended, protect):
    """KL from the model to itself with one expert per token in its first layer, in NumPy."""
    model, batch = attended
    first, second = layers(model)
    rule = with_rule(first, SkipSmallGates(protect=protect), {"beta": jnp.float32(1.01)})
    base, skipping = (
        np.asarray(run(m, batch).logits_BxSxV, np.float64)
        for m in (model, with_layers(model, [rule, second]))
    )
    base -= np.log(np.exp(base).sum(-1, keepdims=True))
    skipping -= np.log(np.exp(skipping).sum(-1, keepdims=True))
    return float((np.exp(base) * (base - skipping)).sum(-1).mean())


def test_what_others_attend_to_is_worth_its_experts(attended):
    """Catches an importance that is the same for every token, and attention summed over keys."""
    by_importance = divergence(attended, Protection(share=0.02))
    at_random = [
        divergence(attended, Protection(share=0.02, importance=RandomImportance(seed=seed)))
        for seed in range(5)
    ]
    assert by_importance < np.mean(at_random) - 10 * np.std(at_random)
    assert np.mean(at_random) < divergence(attended, None)


def test_a_recipe_with_skipping(model, text):
    """Catches weights that change, statistics that outlive the routing, and rows for nothing."""
    source = Source(text)
    after, ledger = apply(model, (DynamicSkip(rule=ODP), FOUR_BITS), source)
    assert [row.matrix for row in ledger] and {row.pass_name for row in ledger} == {"Quantize"}
    assert len(source.asked) == 2 and "gate_ratios" in source.asked[0]
    assert "expert_counts" in source.asked[1]
    counts = sum(
        row.tokens or 0 for row in ledger if row.matrix.endswith("gate") and row.layer == 0
    )
    assert counts < 1.6 * sum(int(b.mask_BxS.sum()) for b in text)
    for name, weight in parameters(model).items():
        if ".experts." not in name:
            np.testing.assert_array_equal(parameters(after)[name], weight)
    betas = [float(parameters(after)[f"layers.{i}.moe.rules.0.beta"]) for i in (0, 1)]
    assert 0 < betas[0] < 1 and betas[0] != betas[1] and len(after.runs) == 1


def test_the_plan_is_what_the_recipe_gives(model, stats):
    """Catches an outline of another spec, or one that computes."""
    step = DynamicSkip(rule=ODP, layers=(1,))
    assert isinstance(step, Pass) and from_json(to_json(step)) == step
    graphdef, state = nnx.split(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    outlined, touched = step.outline(nnx.merge(graphdef, shapes))
    after = treated(model, stats, step)
    assert outlined.spec == after.spec and touched == ()
    mine, real = parameters(outlined), parameters(after)
    assert mine.keys() == real.keys()
    for name, value in mine.items():
        assert isinstance(value, jax.ShapeDtypeStruct)
        assert (value.shape, value.dtype) == (real[name].shape, real[name].dtype), name


def test_everything_must_be_collected_anew():
    """Catches moments of tokens that an expert no longer sees."""
    for accumulator in (ExpertCounts(), GateRatios(), SecondMoments(tap="expert_input")):
        assert DynamicSkip().invalidates(accumulator)


def test_layers_that_cannot_skip_are_refused():
    """Catches a pass that skips the only expert, or does nothing without a word."""
    one = make_model(spec=make_spec(dense(), routed(k=1)))
    for step, match in (
        (DynamicSkip(), "one expert per token"),
        (DynamicSkip(layers=(0,)), "layers with experts are 1"),
        (DynamicSkip(layers=()), "layers"),
    ):
        with pytest.raises(SpecError, match=match):
            check_recipe((step,), one)
    with pytest.raises(SpecError, match="quantile"):
        DynamicSkip(quantile=1.5)
