"""Dropped feed-forwards, mixers and blocks: which, what is left, what the ledger says."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import LayerInputs, StreamCosine, collect
from moejax.checkpoint import load_model, payload_bytes, save_model
from moejax.compress import (
    Consecutive,
    LayerDrop,
    MixerLayer,
    MostSimilar,
    RandomLayers,
    RoutedLayer,
    WholeBlock,
    account,
    check_recipe,
    touched,
)
from moejax.core import SpecError
from moejax.evaluate import evaluate
from moejax.models import EarlierKV, SharedKV, abstract_model, generate, parameters, with_parameters
from tests.compress.conftest import Source, apply, assert_same_weights, leaves, logits
from tests.evaluate.conftest import MIXER, dense, make_model, make_spec, routed

SPEC = make_spec(*(routed(),) * 4)


@pytest.fixture(scope="module")
def deep():
    """Four layers: the feed-forward of layer 2 and all of layer 1 change nothing."""
    model = make_model(0, SPEC)
    named = dict(parameters(model))
    for name in ("layers.2.moe.experts.down", "layers.1.moe.experts.down", "layers.1.attention.o"):
        named[name] = jnp.zeros_like(named[name])
    return with_parameters(SPEC, named)


@pytest.fixture(scope="module")
def dropped(deep, text):
    found = {}

    def drop(step):
        if step not in found:
            found[step] = apply(deep, [step], Source(text))
        return found[step]

    return drop


def without(model, part):
    return [i for i, layer in enumerate(model.spec.layers) if getattr(layer, part) is None]


def test_what_changes_nothing_goes_first(deep, dropped, text):
    """Catches an order upside down, similarities of normed inputs, and a residual left out."""
    for step, gone in (
        (LayerDrop(count=2), {"ffn": [1, 2], "mixer": []}),
        (LayerDrop(count=1, part=MixerLayer()), {"ffn": [], "mixer": [1]}),
        (LayerDrop(count=1, part=WholeBlock()), {"ffn": [1], "mixer": [1]}),
    ):
        after, ledger = dropped(step)
        assert {part: without(after, part) for part in gone} == gone
        np.testing.assert_allclose(logits(after, text), logits(deep, text), atol=1e-5)
        lost = {n for n in leaves(deep)} - {n for n in leaves(after)}
        rows = {f"layers.{row.layer}.{row.matrix}" for row in ledger}
        assert rows == {n for n in lost if "norm" not in n}
        assert all(row.dropped and row.stored_bytes == 0 for row in ledger)


def test_the_cosine_is_that_of_the_residual_stream(deep, text):
    """Catches a similarity of the normed input and the layer's output: planted layers give 1."""
    cosine = StreamCosine(before="mixer_output", after="block_output")
    found = [float(s[cosine.name]) for s in collect(deep, text, (cosine,)).layers]
    assert found[1] == pytest.approx(1, abs=1e-5) and found[2] == pytest.approx(1, abs=1e-5)
    assert found[0] < 0.99 and found[3] < 0.99


def test_neighbours_are_those_of_brute_force(deep, text):
    """Catches windows one block too long, and windows scored by the mean of their blocks."""
    places = [LayerInputs(tokens=64, tap=tap) for tap in ("block_input", "block_output")]
    stats = collect(deep, text, places)

    def cosine(a, b):
        return np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))

    for count in (1, 2, 3):
        score = [
            cosine(stats.of(first, places[0]), stats.of(first + count - 1, places[1]))
            for first in range(5 - count)
        ]
        best = int(np.argmax(score))
        step = LayerDrop(count=count, part=WholeBlock(), choice=Consecutive(tokens=64))
        assert step.decide(stats, deep) == frozenset(range(best, best + count))


@pytest.mark.parametrize("count", [1, 3])
def test_models_without_blocks_run_everywhere(deep, dropped, text, tmp_path, count):
    """Catches two empty blocks stored as one run of one, and layers that are renumbered."""
    step = LayerDrop(count=count, part=WholeBlock(), choice=Consecutive())
    after, ledger = dropped(step)
    assert len(after.spec.layers) == 4 and len(without(after, "mixer")) == count
    outlined, names = step.outline(abstract_model(deep.spec))
    assert payload_bytes(outlined, jnp.bfloat16) == payload_bytes(after, jnp.bfloat16)
    assert len(names) == count * len([n for n in parameters(deep) if n.startswith("layers.0.")])
    save_model(tmp_path / "model", after)
    again = load_model(tmp_path / "model")
    assert_same_weights(again, after)
    prompt = text[0].tokens_BxS[:2, :5]
    np.testing.assert_array_equal(generate(again, prompt, 4), generate(after, prompt, 4))
    scores = evaluate({"a": after, "b": deep}, text, base={"a": "b"}, group_bytes={"docs": 1})
    assert np.isfinite(scores["a"].average.kl)
    assert account(after, touched(ledger, "arm")).stored_bytes < account(deep).stored_bytes


def test_dropping_none_changes_nothing(deep, dropped):
    """Catches a count that is off by one."""
    after, ledger = dropped(LayerDrop(count=0))
    assert_same_weights(after, deep)
    assert not len(ledger)


def test_random_layers_are_fixed_by_their_seed(deep):
    """Catches a control that is another one each time, or the same for all seeds."""
    plans = [
        LayerDrop(count=2, choice=RandomLayers(seed=seed)).decide(None, deep)
        for seed in (0, 0, 1, 2, 3)
    ]
    assert plans[0] == plans[1] and len(set(plans)) > 1


def test_what_cannot_be_dropped_is_refused(deep):
    """Catches layers that lose what others read, and more layers dropped than there are."""
    split = make_spec(routed(), dense(), routed())
    shared = dataclasses.replace(MIXER, kv=SharedKV())
    reading = dataclasses.replace(MIXER, kv=EarlierKV())
    layers = [dataclasses.replace(routed(), mixer=mixer) for mixer in (shared, reading)]
    for spec, step, wanted in (
        (SPEC, LayerDrop(count=5), "LayerDrop.count = 5, but 4 layers have a RoutedLayer"),
        (split, LayerDrop(count=2, choice=Consecutive()), "no 2 neighbouring layers"),
        (make_spec(*layers), LayerDrop(count=2, part=MixerLayer()), "all but 1 layers"),
        (make_spec(*layers), LayerDrop(count=2, part=WholeBlock()), "all but 1 layers"),
    ):
        with pytest.raises(SpecError, match=wanted):
            check_recipe([step], abstract_model(spec))
    assert RoutedLayer() == LayerDrop(count=1).part and MostSimilar() == LayerDrop(count=1).choice
