"""Dropless and capacity dispatch against the dense oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.taps import NOTHING
from moejax.moe import (
    GELU,
    AttentionScores,
    BiasedTopK,
    Capacity,
    ChoiceCapacity,
    ChosenSoftmaxGates,
    ClampedSwiGLU,
    Dense,
    Dropless,
    GroupLimited,
    LinearScores,
    MoELayer,
    MoESpec,
    NestedSwiGLU,
    PNormGates,
    RouterContext,
    RouterSpec,
    Routing,
    SigmoidGates,
    SigmoidSharedGate,
    SlotMap,
    SlotSpec,
    SoftmaxGates,
    SparseMixerGates,
    StandardisedScores,
    TanhScores,
    TopK,
)

ROUTERS = {
    "softmax_topk": RouterSpec(selector=TopK(k=2), gates=SoftmaxGates()),
    "softmax_topk_renorm": RouterSpec(selector=TopK(k=2), gates=SoftmaxGates(renormalise=True)),
    "topk_softmax": RouterSpec(selector=TopK(k=3), gates=ChosenSoftmaxGates()),
    "sigmoid_bias": RouterSpec(selector=BiasedTopK(k=2), gates=SigmoidGates(scale=2.5)),
    "switch": RouterSpec(selector=TopK(k=1), gates=SoftmaxGates()),
    "deepseek_v2": RouterSpec(
        selector=GroupLimited(selector=TopK(k=3), groups=3, kept=2), gates=SoftmaxGates(scale=4.0)
    ),
    "deepseek_v3": RouterSpec(
        selector=GroupLimited(selector=BiasedTopK(k=2), groups=2, kept=1, best=2),
        gates=SigmoidGates(scale=2.5),
    ),
    "dbrx": RouterSpec(selector=TopK(k=2), gates=PNormGates(order=2.0)),
    "phimoe": RouterSpec(selector=TopK(k=2), gates=SparseMixerGates(jitter=0.2)),
    "gpt_oss": RouterSpec(
        selector=TopK(k=3), gates=ChosenSoftmaxGates(), scores=LinearScores(bias=True)
    ),
    "llama_moe": RouterSpec(
        selector=TopK(k=2), gates=ChosenSoftmaxGates(scale=4.0), scores=TanhScores(hidden=5)
    ),
    "skywork": RouterSpec(
        selector=TopK(k=2), gates=SoftmaxGates(renormalise=True), scores=StandardisedScores()
    ),
    "yuan": RouterSpec(selector=TopK(k=2), gates=ChosenSoftmaxGates(), scores=AttentionScores()),
}
EXPERTS = {  # kinds of experts, each with one of the routers
    "gpt_oss": (ROUTERS["gpt_oss"], {"activation": ClampedSwiGLU(), "expert_bias": True}),
    "openmoe": (ROUTERS["softmax_topk"], {"activation": NestedSwiGLU()}),
    "qwen2_moe": (ROUTERS["dbrx"], {"shared_width": 5, "shared_gate": SigmoidSharedGate()}),
    "grok": (ROUTERS["switch"], {"activation": GELU(approximate=True), "expert_bias": True}),
}
E, D, F, T = 6, 8, 4, 20


def layer(router, dispatch, **more):
    spec = MoESpec(experts=E, width=F, router=router, dispatch=dispatch, **more)
    return MoELayer(spec, D, 0.5, rngs=nnx.Rngs(0))


@functools.cache
def compiled(dispatch, router, more):
    """(parameters, jitted gradients of sum(y * c)); compiled once, whatever the skew."""
    module = layer(router, dispatch, **dict(more))
    for place, (path, variable) in enumerate(nnx.iter_graph(module)):
        # Biases start at zero, where a wrong one would not show.
        if isinstance(variable, nnx.Variable) and str(path[-1]).endswith("bias"):
            value = variable.get_value()
            variable.set_value(0.3 * jax.random.normal(jax.random.key(place), value.shape))
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)
    weight_TxD = jax.random.normal(jax.random.key(7), (T, D))

    def value(state, x_TxD, mask_T, skew):
        module = nnx.merge(graphdef, state, rest)
        scores = module.router.scores
        kernel = scores["kernel" if "kernel" in scores else "value"]
        # A common direction in the tokens sends most of them to the first experts.
        kernel.set_value(kernel.get_value().at[0, :2].add(skew))
        y_TxD, _, _ = module(x_TxD, RouterContext(mask_T=mask_T), NOTHING)
        return jnp.sum(jnp.where(mask_T[:, None], y_TxD, 0) * weight_TxD), y_TxD

    return state, jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def run(dispatch, router, x_TxD, mask_T, skew=0.0, **more):
    """Output and gradients of sum(y * c) for tokens and every parameter."""
    state, gradients = compiled(dispatch, router, tuple(more.items()))
    (_, y_TxD), grads = gradients(state, x_TxD, mask_T, skew)
    return y_TxD, jax.tree.leaves(grads)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("skew", [0.0, 8.0], ids=["balanced", "empty experts"])
def test_dropless_equals_dense_forward_and_gradients(name, skew):
    """Catches a wrong inverse permutation, a lost gate gradient, padding that reaches experts."""
    x_TxD = jax.random.normal(jax.random.key(1), (T, D)).at[:, 0].set(1.0)
    mask_T = jnp.arange(T) % 5 != 3
    oracle, oracle_grads = run(Dense(), ROUTERS[name], x_TxD, mask_T, skew)
    y_TxD, grads = run(Dropless(), ROUTERS[name], x_TxD, mask_T, skew)
    np.testing.assert_allclose(y_TxD, oracle, atol=2e-6)
    assert len(grads) == len(oracle_grads)
    for got, expected in zip(grads, oracle_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.any(np.asarray(y_TxD)[~np.asarray(mask_T)])


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize(
    "dispatch", [Dropless(), Capacity(factor=float(E))], ids=["dropless", "capacity"]
)
def test_every_kind_of_expert_equals_dense(name, dispatch):
    """Catches biases of rows that serve no assignment, in outputs or in gradients: padding behind
    the last group (Dropless) and empty rows inside the groups (Capacity); a shared gate skipped."""
    router, more = EXPERTS[name]
    x_TxD = jax.random.normal(jax.random.key(1), (T, D)).at[:, 0].set(1.0)
    mask_T = jnp.arange(T) < 17
    oracle, oracle_grads = run(Dense(), router, x_TxD, mask_T, 8.0, **more)
    y_TxD, grads = run(dispatch, router, x_TxD, mask_T, 8.0, **more)
    routed_T = np.asarray(mask_T)  # padding is routed nowhere, but shared experts see it
    np.testing.assert_allclose(np.asarray(y_TxD)[routed_T], oracle[routed_T], atol=4e-6)
    assert len(grads) == len(oracle_grads)
    for got, expected in zip(grads, oracle_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(("kind", "name"), [(Capacity, "switch"), (ChoiceCapacity, "softmax_topk")])
def test_capacity_with_room_equals_dense(kind, name):
    """Catches empty capacity rows that leak into outputs or gradients."""
    x_TxD = jax.random.normal(jax.random.key(1), (T, D))
    mask_T = jnp.arange(T) < 17
    oracle, oracle_grads = run(Dense(), ROUTERS[name], x_TxD, mask_T)
    y_TxD, grads = run(kind(factor=float(E)), ROUTERS[name], x_TxD, mask_T)
    np.testing.assert_allclose(y_TxD, oracle, atol=2e-6)
    for got, expected in zip(grads, oracle_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def assignments(expert_TxK, valid_TxK, gate_TxK):
    """A routing from explicit choices."""
    tokens, k = expert_TxK.shape
    return Routing(
        token_A=jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), k),
        expert_A=jnp.asarray(expert_TxK, jnp.int32).reshape(-1),
        gate_A=jnp.asarray(gate_TxK, jnp.float32).reshape(-1),
        valid_A=jnp.asarray(valid_TxK).reshape(-1),
        logits_TxE=jnp.zeros((tokens, E)),
        probabilities_TxE=jnp.full((tokens, E), 1 / E),
        per_token=k,
    )


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_capacity_counts_and_keeps_in_token_order(data):
    """Catches drops that are not counted, kept twice, or taken from the wrong end of the queue."""
    tokens, k = 7, 2
    expert = np.array(
        data.draw(st.lists(st.permutations(range(4)), min_size=tokens, max_size=tokens))
    )[:, :k]
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=tokens * k, max_size=tokens * k)))
    factor = data.draw(st.sampled_from([0.3, 0.6, 1.0, 2.0]))
    gate = np.arange(1, tokens * k + 1, dtype=np.float32).reshape(tokens, k)
    routing = assignments(expert, valid.reshape(tokens, k), gate)
    plan = Capacity(factor=factor).plan(routing, routing.expert_A, 4)
    C = plan.group_sizes_E[0]
    queues = {e: [] for e in range(4)}
    for a in range(tokens * k):
        if valid[a]:
            queues[expert.reshape(-1)[a]].append(a)
    kept = sorted(a for queue in queues.values() for a in queue[: int(C)])
    assert int(plan.dropped) == valid.sum() - len(kept)
    rows = np.asarray(plan.assignment_R)
    assert sorted(rows[np.asarray(plan.valid_R)].tolist()) == kept
    y_TxD = plan.gather(jnp.ones((rows.size, 1)))
    expected = np.zeros((tokens, 1))
    for a in kept:
        expected[a // k] += gate.reshape(-1)[a]
    np.testing.assert_allclose(y_TxD, expected, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_first_choices_have_rows_before_second_ones(data):
    """Catches token order, in which an early token's second choice takes a later one's first."""
    tokens, k = 9, 2
    draw = st.lists(st.permutations(range(4)), min_size=tokens, max_size=tokens)
    expert = np.array(data.draw(draw))[:, :k]
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=tokens * k, max_size=tokens * k)))
    gate = np.arange(1, tokens * k + 1, dtype=np.float32).reshape(tokens, k)
    routing = assignments(expert, valid.reshape(tokens, k), gate)
    for factor, least, room in ((0.5, 1, 2), (0.7, 1, 4), (0.5, 3, 3), (9.0, 1, 18)):
        plan = ChoiceCapacity(factor=factor, least=least).plan(routing, routing.expert_A, 4)
        assert plan.group_sizes_E.tolist() == [room] * 4  # 18 * 0.7 / 4 = 3.15: 3, made even
        taken, expected, dropped = [0] * 4, np.zeros((tokens, 1)), 0
        for choice in range(k):
            for token in range(tokens):
                if not valid[token * k + choice]:
                    continue
                e = expert[token, choice]
                taken[e] += 1
                if taken[e] <= room:
                    expected[token] += gate[token, choice]
                else:
                    dropped += 1
        y_TxD = plan.gather(jnp.ones((4 * room, 1)))
        np.testing.assert_allclose(y_TxD, expected, rtol=1e-6)
        assert int(plan.dropped) == dropped


def test_list_without_fixed_k_equals_dense():
    """Catches a plan that relies on T x K lists: expert choice and top-p need any list."""
    routing = Routing(
        token_A=jnp.array([3, 0, 0, 2, 3], jnp.int32),
        expert_A=jnp.array([1, 1, 0, 2, 2], jnp.int32),
        gate_A=jnp.array([0.5, 2.0, 1.0, 0.25, 3.0]),
        valid_A=jnp.array([True, True, False, True, True]),
        logits_TxE=jnp.zeros((4, 3)),
        probabilities_TxE=jnp.zeros((4, 3)),
    )
    x_TxD = jax.random.normal(jax.random.key(0), (4, 5))

    def loss(x_TxD, dispatch):
        plan = dispatch.plan(routing, routing.expert_A, 3)
        scale_R = jnp.repeat(
            jnp.arange(1.0, 4.0), plan.group_sizes_E, total_repeat_length=plan.token_R.size
        )
        return jnp.sum(plan.gather(plan.scatter(x_TxD) * scale_R[:, None]) ** 2)

    for dispatch in (Dropless(), Capacity(factor=3.0)):
        got, grad = jax.value_and_grad(loss)(x_TxD, dispatch)
        expected, expected_grad = jax.value_and_grad(loss)(x_TxD, Dense())
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_slot_map_merges_and_replicates():
    """Catches a slot map applied after the sort, or copies that all serve from the first slot."""
    slots = SlotMap(jnp.array([[0, 0], [1, 3], [0, 0], [2, 2]], jnp.int32), jnp.array([1, 2, 1, 1]))
    expert_A, token_A = jnp.array([0, 1, 1, 2, 3, 1]), jnp.array([0, 0, 1, 2, 3, 4])
    assert slots(expert_A, token_A).tolist() == [0, 1, 3, 0, 2, 1]
    more = {"slots": SlotSpec(stored=3)}  # router experts e and e + 3 share a stored expert
    x_TxD = jax.random.normal(jax.random.key(1), (T, D))
    mask_T = jnp.ones(T, bool)
    router = RouterSpec(selector=TopK(k=4), gates=SoftmaxGates())
    oracle, oracle_grads = run(Dense(), router, x_TxD, mask_T, **more)
    y_TxD, grads = run(Dropless(), router, x_TxD, mask_T, **more)
    np.testing.assert_allclose(y_TxD, oracle, atol=2e-6)
    for got, expected in zip(grads, oracle_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_shared_experts_see_every_token():
    """Catches shared experts that are weighed by a gate or skip tokens."""
    spec = MoESpec(experts=E, width=F, router=ROUTERS["switch"], shared_width=3)
    module = MoELayer(spec, D, 0.5, rngs=nnx.Rngs(0))
    x_TxD = jax.random.normal(jax.random.key(1), (T, D))
    with_shared, _, _ = module(x_TxD, RouterContext(), NOTHING)
    shared = module.shared(x_TxD)
    module.spec = dataclasses.replace(spec, shared_width=0)
    module.shared = None
    routed, _, _ = module(x_TxD, RouterContext(), NOTHING)
    np.testing.assert_allclose(with_shared - routed, shared, atol=1e-6)
