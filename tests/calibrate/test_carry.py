"""Calibration of models whose layers read more than the residual stream."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.calibrate import SecondMoments, collect
from moejax.core import taps
from moejax.data import EvalBatch
from moejax.models import DecoderLM, forward
from tests.models.test_shared_kv import GIVES, READS, spec_of


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, leaves, tokens_BxS):
    return forward(nnx.merge(graphdef, leaves), tokens_BxS, request=taps.NAMES)


def test_a_walk_through_the_layers_carries_the_keys():
    """Catches calibration that runs a reading layer without its keys, or with those of another
    batch."""
    model = DecoderLM(spec_of(GIVES, READS, READS, GIVES, READS), rngs=nnx.Rngs(0))
    tokens = np.asarray(jax.random.randint(jax.random.key(2), (4, 6), 0, 24))
    everyone = np.ones((2, 6), bool)
    batches = [EvalBatch(tokens[i : i + 2], everyone, everyone, "text") for i in (0, 2)]
    moments = SecondMoments(tap=taps.ATTENTION_CONTEXT)
    found = collect(model, batches, [moments])
    out = run(*nnx.split(model), jnp.asarray(tokens))
    for index, tapped in enumerate(out.taps):
        rows = np.asarray(tapped[taps.ATTENTION_CONTEXT], np.float64).reshape(24, -1)
        expected = rows.T @ rows
        got = found.of(index, moments)[0]
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
