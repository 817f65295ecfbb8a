"""Tiny random models and a text of two groups."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.core import taps
from moejax.data import EvalBatch, windows
from moejax.models import AttentionSpec, DecoderLM, DenseSpec, LayerSpec, ModelSpec, forward
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK

VOCAB, LENGTH = 64, 16
MIXER = AttentionSpec(heads=4, kv_heads=2, head_width=8)


def routed(experts=6, k=2, renormalise=True):
    router = RouterSpec(selector=TopK(k=k), gates=SoftmaxGates(renormalise=renormalise))
    return LayerSpec(mixer=MIXER, ffn=MoESpec(experts=experts, width=32, router=router))


def dense():
    return LayerSpec(mixer=MIXER, ffn=DenseSpec(width=32))


def make_spec(*layers, **changes):
    spec = ModelSpec(vocab=VOCAB, width=32, layers=layers or (routed(), routed()), init_scale=0.25)
    return dataclasses.replace(spec, **changes)


def make_model(seed=0, spec=None):
    return DecoderLM(spec or make_spec(), rngs=nnx.Rngs(seed))


def make_tokens(count, seed=0):
    """Skewed token ids, so that experts differ in how often they are chosen."""
    draws = np.random.default_rng(seed).random(count) ** 2
    return (draws * VOCAB).astype(np.int32)


def cut(groups, batch, length=LENGTH):
    """Batches of windows of all groups; groups: name -> tokens."""
    found = []
    for group, tokens in groups.items():
        found += windows(tokens, length, batch, group=group)
    return found


def padded(batch: EvalBatch, rows=0, columns=0):
    """The batch with rows and columns more that do not count."""
    room = ((0, rows), (0, columns))
    tokens, targets, mask = (np.pad(part, room) for part in batch[:3])
    return EvalBatch(tokens, targets, mask, batch.group)


@functools.partial(jax.jit, static_argnames=("graphdef", "request"))
def _run(graphdef, state, tokens_BxS, mask_BxS, request):
    return forward(nnx.merge(graphdef, state), tokens_BxS, mask_BxS=mask_BxS, request=request)


def run(model, batch, request=frozenset({taps.ROUTING})):
    """The forward pass on a batch, compiled once per structure."""
    return _run(*nnx.split(model), batch.tokens_BxS, batch.mask_BxS, request)


@pytest.fixture(scope="session")
def model():
    return make_model(0)


@pytest.fixture(scope="session")
def other():
    return make_model(1)


@pytest.fixture(scope="session")
def groups():
    return {"docs": make_tokens(75, 0), "code": make_tokens(50, 1)}
