"""Models after surgery come back as they were: slot maps, and rules with their thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.checkpoint import load_model, payload_bytes, save_model, stored_bytes
from moejax.models import (
    DecoderLM,
    abstract_model,
    forward,
    layers,
    parameters,
    with_layers,
    with_parameters,
    with_rule,
)
from moejax.moe import Protection, SkipSmallGates, SlotSpec

ODP = SkipSmallGates(protect=Protection(share=0.25))
RATIO = SkipSmallGates(renormalise=False)


def slotted(spec):
    """Three stored experts for the router's, two of which are shared, one replicated."""
    layer = spec.layers[0]
    ffn = dataclasses.replace(layer.ffn, slots=SlotSpec(stored=3, copies=2))
    spec = dataclasses.replace(spec, layers=(dataclasses.replace(layer, ffn=ffn),) * 2)
    named = parameters(DecoderLM(spec, rngs=nnx.Rngs(0)))
    experts = ffn.experts
    slots = {
        "layers.1.moe.slots.slot": jnp.stack(
            [jnp.arange(experts) % 3, (jnp.arange(experts) + 1) % 3], 1
        ).astype(jnp.int32),
        "layers.1.moe.slots.copies": 1 + jnp.arange(experts, dtype=jnp.int32) % 2,
    }
    return with_parameters(spec, named | slots)


def ruled(spec):
    """Two layers of one rule each and other thresholds, a third with another rule on top."""
    spec = dataclasses.replace(spec, layers=spec.layers * 3)
    beta = lambda value: {"beta": jnp.float32(value)}
    blocks = layers(DecoderLM(spec, rngs=nnx.Rngs(0)))
    blocks = [with_rule(b, ODP, beta(1 / 3 + i / 7)) for i, b in enumerate(blocks)]
    blocks[2] = with_rule(blocks[2], RATIO, beta(0.2))
    return with_layers(DecoderLM(spec, rngs=nnx.Rngs(0)), blocks)


def logits(model):
    tokens_BxS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 8)))
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s: forward(nnx.merge(graphdef, s), tokens_BxS).logits_BxSxV)(state)


@pytest.mark.parametrize("build", [slotted, ruled])
def test_surgery_comes_back_bit_for_bit(tmp_path, spec, build):
    """Catches a table that is rebuilt from the spec instead of being read, or lost on the way."""
    model = build(spec)
    save_model(tmp_path, model)
    again = load_model(tmp_path, spec=model.spec)
    given, found = parameters(model), parameters(again)
    assert given.keys() == found.keys() == parameters(abstract_model(model.spec)).keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert [nnx.split(run)[0] for run in again.runs] == [nnx.split(run)[0] for run in model.runs]
    np.testing.assert_array_equal(logits(again), logits(model))
    assert stored_bytes(tmp_path) == payload_bytes(abstract_model(model.spec))


def test_thresholds_keep_float32_in_a_bfloat16_model(tmp_path, spec):
    """Catches beta = 1/3 rounded to what bfloat16 holds, which moves tokens over the threshold."""
    model = ruled(spec)
    save_model(tmp_path, model, dtype=jnp.bfloat16)
    found = parameters(load_model(tmp_path, dtype=None))
    beta = found["layers.0.moe.rules.0.beta"]
    assert beta.dtype == jnp.float32 and float(beta) == np.float32(1 / 3)
    assert float(found["layers.2.moe.rules.1.beta"]) == np.float32(0.2)
    assert found["layers.0.moe.experts.gate"].dtype == jnp.bfloat16
