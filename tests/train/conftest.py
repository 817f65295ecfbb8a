"""A tiny MoE model with a stateful router, and its training step."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.models import AttentionSpec, DecoderLM, LayerSpec, ModelSpec, combine, partition
from moejax.moe import BiasedTopK, MoESpec, RouterSpec, SigmoidGates

VOCAB = 24


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    router = RouterSpec(selector=BiasedTopK(k=2, rate=0.01), gates=SigmoidGates())
    mixer = AttentionSpec(heads=2, kv_heads=1, head_width=8)
    layer = LayerSpec(mixer=mixer, ffn=MoESpec(experts=4, width=8, router=router))
    return ModelSpec(vocab=VOCAB, width=16, layers=(layer,) * 2, init_scale=0.2)


@pytest.fixture(scope="session")
def parts(spec):
    return partition(DecoderLM(spec, rngs=nnx.Rngs(0)))


@pytest.fixture
def model(parts):
    """A model of its own arrays, because a training step donates them."""
    structure, trainable, frozen = parts
    copies = [{n: jnp.array(leaf) for n, leaf in leaves.items()} for leaves in (trainable, frozen)]
    return combine(structure, *copies)


@pytest.fixture(scope="session")
def tokens_BxS1():
    return np.random.default_rng(1).integers(0, VOCAB, (4, 9)).astype(np.int32)
