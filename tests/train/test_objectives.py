"""Distillation: divergences against NumPy, and what each objective compares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import SpecError
from moejax.models import (
    DecoderLM,
    DenseSpec,
    combine,
    encode,
    forward,
    layers,
    merge_experts,
    partition,
    with_layers,
)
from moejax.train import (
    AdamW,
    CrossEntropy,
    ForwardKL,
    FromExperts,
    FromHidden,
    FromLogits,
    JensenShannon,
    OnPolicy,
    Passed,
    ReverseKL,
    Term,
    Together,
    start,
    straight_through,
    train_step,
)
from moejax.weights import SymmetricGrid, materialize

RULE = AdamW(peak_learning_rate=1e-2, warmup=0)


def softmax(logits):
    e = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_divergences_are_their_formulas(seed, beta):
    """Catches P and Q exchanged, beta on the wrong side, and a mixture of logits."""
    p, q = 3 * np.random.default_rng(seed).normal(size=(2, 4, 7)).astype(np.float32)
    P, Q = softmax(p), softmax(q)
    np.testing.assert_allclose(ForwardKL()(p, q), kl(P, Q), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(ReverseKL()(p, q), kl(Q, P), rtol=1e-3, atol=1e-5)
    M = beta * P + (1 - beta) * Q
    wanted = beta * kl(P, M) + (1 - beta) * kl(Q, M)
    np.testing.assert_allclose(JensenShannon(beta=beta)(p, q), wanted, rtol=1e-3, atol=1e-5)


def test_jensen_shannon_goes_to_both_kls():
    """Catches a beta that runs the other way (arXiv:2306.13649: limits of its gradient)."""
    p, q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9)), jnp.float32)
    near = 1e-3
    for beta, scale, other in ((near, near, ForwardKL()), (1 - near, near, ReverseKL())):
        ours = jax.grad(lambda q, b=beta: JensenShannon(beta=b)(p, q))(q) / scale
        theirs = jax.grad(lambda q, d=other: d(p, q))(q)
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_the_gradient_of_forward_kl_is_the_difference_of_probabilities():
    """Catches a teacher that is trained too, and a loss that is not KL's gradient."""
    p, q = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9)), jnp.float32)
    gradient = jax.grad(lambda q: ForwardKL()(p, q))(q)
    np.testing.assert_allclose(gradient, softmax(q) - softmax(p), atol=1e-6)


@pytest.fixture(scope="module")
def teacher(spec):
    return DecoderLM(spec, rngs=nnx.Rngs(5))


def loss_of(model, tokens_BxS1, objective, teacher, step=0):
    """What an objective says of two models on a batch."""
    graphs, states = zip(*(nnx.split(m) for m in (model, teacher or model)), strict=True)
    return float(_loss(graphs, states, objective, tokens_BxS1, step))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _loss(graphs, states, objective, tokens_BxS1, step):
    both = []
    for graphdef, state in zip(graphs, states, strict=True):
        model = nnx.merge(graphdef, state)
        tokens_BxS = tokens_BxS1[:, :-1]
        both.append(Passed(model, encode(model, tokens_BxS, request=objective.request)))
    target_T = jnp.asarray(tokens_BxS1[:, 1:]).reshape(-1)
    return objective(*both, target_T, jnp.int32(step))


def test_logits_are_compared_at_a_temperature(model, teacher, tokens_BxS1):
    """Catches a missing temperature, a missing square of it, and a sum over tokens."""
    mine, theirs = (np.asarray(_logits(*nnx.split(m)[::-1], tokens_BxS1)) for m in (model, teacher))
    wanted = 4 * kl(softmax(theirs / 2), softmax(mine / 2)).mean()
    found = loss_of(model, tokens_BxS1, FromLogits(temperature=2.0), teacher)
    assert found == pytest.approx(wanted, rel=1e-4)


@functools.partial(jax.jit, static_argnums=1)
def _logits(state, graphdef, tokens_BxS1):
    return forward(nnx.merge(graphdef, state), tokens_BxS1[:, :-1]).logits_BxSxV


def test_a_student_like_its_teacher_has_nothing_to_learn(model, tokens_BxS1):
    """Catches taps of different passes, a teacher in training mode, and slots read wrongly."""
    structure, trainable, frozen = partition(model)
    twin = combine(structure, jax.tree.map(jnp.array, trainable), frozen)
    both = Together(
        terms=(
            Term(objective=FromLogits(divergence=JensenShannon())),
            Term(objective=FromHidden()),
            Term(objective=FromHidden(of="ffn_output")),
            Term(objective=FromExperts()),
        )
    )
    found = loss_of(model, tokens_BxS1, both, twin)
    assert found == pytest.approx(0, abs=1e-6)


def test_merged_experts_are_compared_through_their_slots(model, tokens_BxS1):
    """Catches stored expert 0 compared with router expert 0 whatever the map says."""
    swap = np.array([3, 2, 1, 0])  # stored in reverse, found again through the map
    blocks = [merge_experts(b, swap, np.eye(4)[swap]) for b in layers(model)]
    student = with_layers(model, blocks)
    structure, trainable, frozen = partition(model)
    twin = combine(structure, jax.tree.map(jnp.array, trainable), frozen)
    found = loss_of(student, tokens_BxS1, FromExperts(), twin)
    assert found == pytest.approx(0, abs=1e-8)


def _with(teacher, asked):
    return [(objective, teacher, step) for objective, step in asked]


def test_terms_count_in_their_part_of_the_run(model, teacher, tokens_BxS1):
    """Catches a stage that never ends, or ends a step late (MoS, arXiv:2201.05596)."""
    staged = Together(
        terms=(
            Term(objective=CrossEntropy(), weight=0.75),
            Term(objective=FromLogits(), weight=0.25, end=3),
        )
    )
    asked = ((CrossEntropy(), 0), (FromLogits(), 0), (staged, 2), (staged, 3))
    values = [loss_of(model, tokens_BxS1, *pair) for pair in _with(teacher, asked)]
    text, taught, during, after = values
    assert during == pytest.approx(0.75 * text + 0.25 * taught, rel=1e-5)
    assert after == pytest.approx(0.75 * text, rel=1e-5)


def test_a_student_comes_nearer_to_its_teacher(model, teacher, tokens_BxS1):
    """Catches a sign, and a gradient that stops."""
    structure, state = start(model, RULE, 30)
    step = train_step(structure, RULE, 30, objective=FromLogits(), teacher=teacher)
    losses = []
    for _ in range(8):
        state, said = step(state, tokens_BxS1)
        losses.append(float(said.loss))
    assert losses[-1] < 0.7 * losses[0]


def test_what_cannot_be_compared_is_refused_before_a_step(model, spec, teacher):
    """Catches shape errors out of a compiled program."""
    structure, _, _ = partition(model)
    with pytest.raises(SpecError, match=r"asks a teacher"):
        train_step(structure, RULE, 10, objective=FromLogits())
    dense = dataclasses.replace(spec.layers[0], ffn=DenseSpec(width=8))
    shallow = DecoderLM(dataclasses.replace(spec, layers=(dense,)), rngs=nnx.Rngs(0))
    for objective, wrong in (
        (FromExperts(), "Router experts"),
        (FromHidden(), "Layers and widths"),
    ):
        with pytest.raises(SpecError, match=wrong):
            train_step(structure, RULE, 10, objective=objective, teacher=shallow)
    other = DecoderLM(dataclasses.replace(spec, vocab=11), rngs=nnx.Rngs(0))
    with pytest.raises(SpecError, match="vocabularies are 24 and 11"):
        train_step(structure, RULE, 10, objective=FromLogits(), teacher=other)


def test_soft_caps_and_biases_are_in_the_loss(spec, tokens_BxS1):
    """Catches a fused loss that knows the output matrix alone."""
    changed = dataclasses.replace(spec, logits_soft_cap=0.5, logits_multiplier=3.0)
    model = DecoderLM(changed, rngs=nnx.Rngs(0))
    logits = _logits(*nnx.split(model)[::-1], tokens_BxS1)
    picked = np.take_along_axis(softmax(logits), tokens_BxS1[:, 1:, None], axis=-1)
    found = loss_of(model, tokens_BxS1, CrossEntropy(), None)
    assert found == pytest.approx(-np.log(picked).mean(), rel=1e-4)


def test_students_write_their_own_rows_and_draw_the_same_again(model, tokens_BxS1):
    """Catches prompts that change, rows beyond the share, and draws that differ after a resume."""
    own = OnPolicy(share=0.5, prompt=3, seed=1)
    first, again = (own.written(model, 0, tokens_BxS1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:, :3], tokens_BxS1[:, :3])
    changed = (first != tokens_BxS1).any(1)
    assert 0 < changed.sum() < len(changed)
    assert not np.array_equal(own.written(model, 1, tokens_BxS1), first)


def test_codes_train_straight_through():
    """Catches a rounding whose gradient is zero, and a forward pass that sees no rounding."""
    grid = SymmetricGrid(bits=3, group=None)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 4)), jnp.float32)

    def loss(leaf):
        seen = straight_through({"a": leaf, "b": leaf}, grid, lambda name: name == "a")
        return (seen["a"] * w).sum(), seen

    (_, seen), gradient = jax.value_and_grad(loss, has_aux=True)(w)
    np.testing.assert_allclose(seen["a"], materialize(grid(w)), atol=1e-6)
    np.testing.assert_array_equal(seen["b"], w)
    np.testing.assert_allclose(gradient, w)
