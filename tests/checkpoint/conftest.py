"""A one-layer MoE model with a stateful router, whose expert matrices fit the format contract."""

import jax.numpy as jnp
import pytest
from flax import nnx

from moejax.models import AttentionSpec, DecoderLM, LayerSpec, ModelSpec, parameters
from moejax.moe import BiasedTopK, MoESpec, RouterSpec, SigmoidGates
from tests.weights.contract import E, K, N


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    router = RouterSpec(selector=BiasedTopK(k=2), gates=SigmoidGates())
    mixer = AttentionSpec(heads=2, kv_heads=1, head_width=16)
    layer = LayerSpec(mixer=mixer, ffn=MoESpec(experts=E, width=N, router=router))
    return ModelSpec(vocab=24, width=K, layers=(layer,))


@pytest.fixture(scope="session")
def named(spec):
    """The parameters of a model by name, the router's bias set to what bfloat16 cannot hold."""
    found = parameters(DecoderLM(spec, rngs=nnx.Rngs(0)))
    bias = "layers.0.moe.router.selector.bias"
    return found | {bias: jnp.arange(E, dtype=jnp.float32) / 3 + 1}
