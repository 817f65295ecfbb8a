"""Dropped neurons against masks, and generation that goes on with those that a prompt uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import Calibration, NeuronNorms, collect
from moejax.checkpoint import load_model, save_model
from moejax.compress import (
    NeuronDrop,
    NeuronMagnitude,
    RandomNeurons,
    check_recipe,
    compress,
)
from moejax.core import SpecError, taps
from moejax.data import EvalBatch
from moejax.models import forward, generate, init_state, parameters, with_parameters
from moejax.runs import Ledger
from tests.compress.conftest import FOUR_BITS, Source, apply, assert_same_weights, logits
from tests.evaluate.conftest import dense, make_model, make_spec, routed, run

HALF = NeuronDrop(fraction=0.5)


@pytest.fixture(scope="module")
def mixed():
    """A routed layer and a dense one."""
    return make_model(0, make_spec(routed(), dense()))


@pytest.fixture(scope="module")
def halved(mixed, text):
    return apply(mixed, [HALF], Source(text))


def test_the_statistic_is_griffins(mixed, text):
    """Catches rows that are not normalised, and rows of padding or of another expert."""
    found = collect(mixed, text, (NeuronNorms(),))
    request = frozenset({taps.EXPERT_HIDDEN, taps.DISPATCH, taps.FFN_HIDDEN})
    wanted = [np.zeros((6, 32)), np.zeros((1, 32))]
    for batch in text:
        layers = run(mixed, batch, request).taps
        z_RxF, plan = (np.asarray(layers[0][taps.EXPERT_HIDDEN]), layers[0][taps.DISPATCH])
        ends = np.cumsum(plan.group_sizes_E)
        for r in np.flatnonzero(plan.valid_R):
            unit = z_RxF[r] / np.linalg.norm(z_RxF[r])
            wanted[0][np.searchsorted(ends, r, side="right")] += unit**2
        z_TxF = np.asarray(layers[1][taps.FFN_HIDDEN])[np.asarray(batch.mask_BxS).ravel()]
        wanted[1][0] += np.square(z_TxF / np.linalg.norm(z_TxF, axis=1, keepdims=True)).sum(0)
    for layer in range(2):
        np.testing.assert_allclose(found.of(layer, NeuronNorms()), wanted[layer], rtol=1e-4)


def test_what_stays_acts_as_if_the_rest_were_silent(mixed, halved, text):
    """Catches gate, up and down that lose different neurons, and the worst kept."""
    after, ledger = halved
    stats, named = collect(mixed, text, (NeuronNorms(),)), dict(parameters(mixed))
    for layer, name in ((0, "layers.0.moe.experts.down"), (1, "layers.1.ffn.down")):
        score_ExF = stats.of(layer, NeuronNorms())
        gone = np.argsort(np.argsort(-score_ExF, axis=1, kind="stable"), axis=1) >= 16
        gone = gone if layer == 0 else gone[0]
        named[name] = jnp.where(gone[..., None], 0, named[name])
    silent = with_parameters(mixed.spec, named)
    np.testing.assert_allclose(logits(after, text), logits(silent, text), rtol=1e-4, atol=1e-4)
    assert [layer.ffn.width for layer in after.spec.layers] == [16, 16]
    assert {row.lineage for row in ledger} == {("16 of 32 neurons",)} and len(ledger) == 6 * 3 + 3


def test_keeping_all_changes_nothing(mixed, text):
    """Catches neurons that change their order or go by rounding."""
    after, _ = apply(mixed, [NeuronDrop(fraction=0.0)], Source(text))
    assert_same_weights(after, mixed)


def test_it_saves_and_runs(halved, text, tmp_path):
    """Catches a width that the spec does not know of."""
    after, _ = halved
    save_model(tmp_path / "model", after)
    assert_same_weights(load_model(tmp_path / "model"), after)
    outlined, _ = HALF.outline(make_model(0, make_spec(routed(), dense())))
    assert outlined.spec == after.spec


def of_prompt(model, tokens_1xS):
    """The model after the neurons that a prompt does not use are gone."""
    mask = np.ones(tokens_1xS.shape, bool)
    batch = EvalBatch(tokens_1xS, tokens_1xS, mask, "prompt")
    key = jax.random.key(0)
    return compress(model, [HALF], Calibration([batch]), key=key, arm="griffin", ledger=Ledger())


def test_generation_goes_on_with_the_neurons_of_the_prompt(mixed, text):
    """Catches a prompt read by the pruned model, and tokens that come from the whole one."""
    prompt = np.asarray(text[0].tokens_BxS[:1, :8])
    pruned = of_prompt(mixed, prompt)
    found = np.asarray(generate(mixed, prompt, 4, after_prompt=pruned))
    out = forward(mixed, prompt, state=init_state(mixed, 1, 12))
    wanted, state, logits_BxV = [], out.state, out.logits_BxSxV[:, -1]
    for place in range(4):
        wanted.append(int(jnp.argmax(logits_BxV[0])))
        step = jnp.full((1, 1), wanted[-1], jnp.int32)
        out = forward(pruned, step, positions_BxS=jnp.full((1, 1), 8 + place), state=state)
        state, logits_BxV = out.state, out.logits_BxSxV[:, 0]
    assert found[0].tolist() == wanted
    np.testing.assert_array_equal(
        generate(mixed, prompt, 4, after_prompt=mixed), generate(mixed, prompt, 4)
    )


def test_controls_differ(mixed):
    """Catches controls that read the text, or one seed for all layers."""

    class Nothing:
        layers = ({}, {})

    plans = [
        NeuronDrop(score=score).decide(Nothing(), mixed)
        for score in (NeuronMagnitude(), RandomNeurons(), RandomNeurons(seed=1))
    ]
    for a in range(3):
        for b in range(a):
            assert not np.array_equal(plans[a][0], plans[b][0])
    gate, up = (np.asarray(parameters(mixed)[f"layers.1.ffn.{m}"]) for m in ("gate", "up"))
    score = np.linalg.norm(gate, axis=0) * np.linalg.norm(up, axis=0)
    assert plans[0][1][0].tolist() == sorted(np.argsort(-score)[:16].tolist())


def test_what_cannot_lose_neurons_is_refused(mixed):
    """Catches packed experts sliced along their words, and a state of other mixers continued."""
    with pytest.raises(SpecError, match="compressed experts cannot lose neurons"):
        check_recipe([FOUR_BITS, HALF], mixed)
    shorter = make_model(0, make_spec(routed()))
    with pytest.raises(SpecError, match="after_prompt has runs"):
        generate(mixed, np.zeros((1, 4), np.int32), 1, after_prompt=shorter)
