"""Edits of experts under every kind of router and expert: what moves together, what stays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import compat, spec
from moejax.core.taps import NOTHING
from moejax.models import (
    DecoderLM,
    LayerSpec,
    ModelSpec,
    abstract_model,
    layers,
    parameters,
    permute_experts,
    select_experts,
    with_layers,
    with_parameters,
)
from moejax.moe import (
    AttentionScores,
    BiasedTopK,
    ChosenSoftmaxGates,
    ClampedSwiGLU,
    GroupLimited,
    LinearScores,
    MoESpec,
    NestedSwiGLU,
    RouterContext,
    RouterSpec,
    Scores,
    SigmoidGates,
    SigmoidSharedGate,
    SoftmaxGates,
    SparseMixerGates,
    StandardisedScores,
    TanhScores,
    TopK,
)

T, D, E, F = 30, 8, 6, 5
TOP = TopK(k=2)
GROUPS = GroupLimited(selector=BiasedTopK(k=2), groups=3, kept=2, best=2)


def moe(selector, gates, scores=None, **more):
    router = RouterSpec(selector=selector, gates=gates, scores=scores or LinearScores())
    return MoESpec(experts=E, width=F, router=router, **more)


KINDS = {
    "gpt_oss": moe(
        TopK(k=3),
        ChosenSoftmaxGates(),
        LinearScores(bias=True),
        activation=ClampedSwiGLU(),
        expert_bias=True,
    ),
    "deepseek_v3": moe(GROUPS, SigmoidGates(scale=2.5), shared_width=3),
    "qwen2_moe": moe(TOP, SoftmaxGates(), shared_width=3, shared_gate=SigmoidSharedGate()),
    "phimoe": moe(TOP, SparseMixerGates(jitter=0.2)),
    "llama_moe": moe(TOP, ChosenSoftmaxGates(scale=4.0), TanhScores(hidden=E)),
    "yuan": moe(TOP, ChosenSoftmaxGates(), AttentionScores()),
    "skywork": moe(TOP, SoftmaxGates(renormalise=True), StandardisedScores()),
    "openmoe": moe(TOP, SoftmaxGates(), activation=NestedSwiGLU()),
}


@spec
class Without:
    """Other scores, one of whose experts cannot be chosen."""

    scores: Scores
    gone: int

    def init(self, width, experts, scale, key):
        return self.scores.init(width, experts, scale, key)

    def axes(self):
        return self.scores.axes()

    def __call__(self, parameters, x_TxD, context):
        return self.scores(parameters, x_TxD, context).at[:, self.gone].set(-jnp.inf)


def model_of(ffn):
    """A model of one routed layer; biases, which start at zero, are drawn."""
    layer = LayerSpec(mixer=None, ffn=ffn)
    model = ModelSpec(vocab=8, width=D, layers=(layer,), init_scale=0.6)
    named = parameters(DecoderLM(model, rngs=nnx.Rngs(0)))
    for place, name in enumerate(sorted(named)):
        if name.endswith("bias"):
            named[name] = 0.3 * jax.random.normal(jax.random.key(place), named[name].shape)
    return with_parameters(model, named)


def output(block):
    return np.asarray(_output(*nnx.split(block.moe), jax.random.normal(jax.random.key(1), (T, D))))


@functools.partial(jax.jit, static_argnums=0)
def _output(graphdef, state, x_TxD):
    return nnx.merge(graphdef, state)(x_TxD, RouterContext(), NOTHING)[0]


@pytest.mark.parametrize("name", KINDS)
def test_order_does_not_matter(name):
    """Catches biases, groups, state or a router's inner layer that do not move with the experts."""
    model = model_of(KINDS[name])
    block = layers(model)[0]
    moved = permute_experts(block, [4, 0, 5, 2, 1, 3])
    np.testing.assert_allclose(output(moved), output(block), atol=2e-5)
    saved = with_layers(model, [moved])
    assert parameters(abstract_model(saved.spec)).keys() == parameters(saved).keys()
    back = permute_experts(moved, [1, 4, 3, 5, 0, 2])
    assert back.spec == block.spec
    for got, wanted in zip(
        jax.tree.leaves(nnx.split(back)[1]), jax.tree.leaves(nnx.split(block)[1]), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "phimoe", "llama_moe", "openmoe"])
def test_dropped_experts_are_as_if_they_could_not_be_chosen(name):
    """Catches rows of other experts, and a group whose place another takes."""
    block, keep = layers(model_of(KINDS[name]))[0], [5, 1, 0, 3, 4]
    wanted = compat.copied(block)
    gone = 2
    assert wanted.moe is not None
    if "bias" in wanted.moe.router.selector:
        variable = wanted.moe.router.selector["bias"]
        compat.write(variable, compat.read(variable).at[gone].set(-jnp.inf))
    else:
        scores = Without(scores=block.spec.ffn.router.scores, gone=gone)
        router = dataclasses.replace(block.spec.ffn.router, scores=scores)
        wanted.moe.router.spec = router
    np.testing.assert_allclose(output(select_experts(block, keep)), output(wanted), atol=2e-5)
    assert np.abs(output(wanted) - output(block)).max() > 0.01
