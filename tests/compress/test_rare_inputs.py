"""GPTQ on matrices that few families have: what are they multiplied with?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.calibrate import collect
from moejax.compress import GPTQ
from moejax.core import taps
from moejax.data import EvalBatch
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    LayerSpec,
    LocalFilterSpec,
    MLASpec,
    ModelSpec,
    forward,
    parameters,
)
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK

ROUTED = MoESpec(experts=3, width=8, router=RouterSpec(selector=TopK(k=2), gates=SoftmaxGates()))
FILTERED = LayerSpec(
    mixer=AttentionSpec(heads=2, kv_heads=1, head_width=4, filter=LocalFilterSpec()),
    ffn=ROUTED,
    dense_residual=DenseSpec(width=8),
)
LATENT = LayerSpec(
    mixer=MLASpec(heads=2, nope_width=4, rope_width=4, value_width=3, kv_rank=5, q_rank=6),
    ffn=DenseSpec(width=8),
)
INPUTS = {
    (0, "attention.q"): taps.FILTERED_INPUT,
    (0, "attention.k"): taps.FILTERED_INPUT,
    (0, "attention.v"): taps.ATTENTION_INPUT,
    (0, "ffn.gate"): taps.DENSE_INPUT,
    (0, "ffn.down"): taps.FFN_HIDDEN,
    (1, "attention.q_down"): taps.ATTENTION_INPUT,
    (1, "attention.q_up"): taps.QUERY_LATENT,
    (1, "attention.kv_up"): taps.KV_LATENT,
    (1, "attention.o"): taps.ATTENTION_CONTEXT,
    (1, "ffn.gate"): taps.FFN_INPUT,
}


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, leaves, tokens_BxS):
    return forward(nnx.merge(graphdef, leaves), tokens_BxS, request=taps.NAMES).taps


@pytest.fixture(scope="module")
def found():
    spec = ModelSpec(vocab=24, width=12, layers=(FILTERED, LATENT), init_scale=0.4)
    model = DecoderLM(spec, rngs=nnx.Rngs(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(2), (2, 6), 0, 24))
    everyone = np.ones((2, 6), bool)
    batches = [EvalBatch(tokens, tokens, everyone, "text")]
    needs = tuple(dict.fromkeys(a for _, m in INPUTS for a in GPTQ().needs(m)))
    stats = collect(model, batches, needs)
    return model, stats, run(*nnx.split(model), jnp.asarray(tokens))


@pytest.mark.parametrize("at", INPUTS, ids=lambda at: f"{at[0]}.{at[1]}")
def test_moments_are_of_what_the_matrix_sees(found, at):
    """Catches moments of x where queries see it filtered, or of the routed branch's input where a
    dense residual has its own; layers without these taps must keep the usual ones."""
    model, stats, tapped = found
    index, matrix = at
    rows = np.asarray(tapped[index][INPUTS[at]], np.float64).reshape(12, -1)
    shape = parameters(model)[f"layers.{index}.{matrix}"].shape
    assert rows.shape[1] == shape[0]
    moments = GPTQ().inputs(matrix, stats.layers[index]).moments
    expected = rows.T @ rows
    np.testing.assert_allclose(moments, expected, atol=1e-5 * np.abs(expected).max())
