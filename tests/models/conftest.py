"""A three-layer decoder with everything in it: dense first layer, shared expert, GQA, qk-norm."""

import dataclasses
import functools

import jax
import pytest
from flax import nnx

from moejax.core import taps
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    LayerSpec,
    ModelSpec,
    ProjectionNorm,
    Rope,
    forward,
)
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK


def make_spec(**changes):
    router = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates(renormalise=True))
    mixer = AttentionSpec(
        heads=4, kv_heads=2, head_width=8, rope=Rope(base=100.0), qk_norm=ProjectionNorm()
    )
    routed = LayerSpec(
        mixer=mixer, ffn=MoESpec(experts=4, width=32, router=router, shared_width=16)
    )
    first = LayerSpec(mixer=mixer, ffn=DenseSpec(width=32))
    spec = ModelSpec(vocab=48, width=32, layers=(first, routed, routed), init_scale=0.25)
    return dataclasses.replace(spec, **changes)


@pytest.fixture(scope="session")
def spec():
    return make_spec()


@pytest.fixture(scope="session")
def model(spec):
    return DecoderLM(spec, rngs=nnx.Rngs(3))


@pytest.fixture(scope="session")
def tokens_BxS():
    return jax.random.randint(jax.random.key(5), (2, 9), 0, 48)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens_BxS, mask_BxS):
    return forward(nnx.merge(graphdef, state), tokens_BxS, mask_BxS=mask_BxS, request=taps.NAMES)


@pytest.fixture(scope="session")
def run():
    """The forward pass, compiled once per structure; eager scans compile anew at every call."""
    return lambda model, tokens_BxS, mask_BxS=None: _run(*nnx.split(model), tokens_BxS, mask_BxS)
