"""Routers and their losses against NumPy references written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import SpecError
from moejax.moe import (
    BiasedTopK,
    ChosenSoftmaxGates,
    GateEntropy,
    MoESpec,
    PooledLoadBalance,
    Router,
    RouterContext,
    RouterSpec,
    RouterZLoss,
    SigmoidGates,
    SoftmaxGates,
    SwitchLoadBalance,
    TopK,
    TopKLoadBalance,
)

T, D, E, K = 32, 8, 5, 2


def route(selector, gates, *, mask_T=None, train=False, bias=None):
    router = Router(RouterSpec(selector=selector, gates=gates), D, E, 0.7, rngs=nnx.Rngs(1))
    if bias is not None:
        router.selector["bias"].set_value(jnp.asarray(bias, jnp.float32))
    x_TxD = jax.random.normal(jax.random.key(0), (T, D))
    routing = router(x_TxD, RouterContext(mask_T=mask_T, train=train))
    logits = np.asarray(x_TxD, np.float64) @ np.asarray(router.scores["kernel"][...], np.float64)
    return routing, logits


def softmax(l):
    e = np.exp(l - l.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(kind, logits, bias=0.0):
    """(experts [T, K], gates [T, K]) in float64."""
    s = 1 / (1 + np.exp(-logits)) if kind == "sigmoid" else softmax(logits)
    chosen = np.argsort(-(s + bias), axis=-1, kind="stable")[:, :K]
    picked = np.take_along_axis(s, chosen, -1)
    if kind == "softmax":
        return chosen, picked
    if kind == "chosen":
        return chosen, softmax(np.take_along_axis(logits, chosen, -1))
    scale = 2.5 if kind == "sigmoid" else 1.0
    return chosen, scale * picked / picked.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("kind", "selector", "gates", "bias"),
    [
        ("softmax", TopK(k=K), SoftmaxGates(), None),
        ("renorm", TopK(k=K), SoftmaxGates(renormalise=True), None),
        ("chosen", TopK(k=K), ChosenSoftmaxGates(), None),
        ("sigmoid", BiasedTopK(k=K), SigmoidGates(scale=2.5), [0.5, -0.5, 0.0, 0.2, -0.1]),
    ],
)
def test_gates_equal_the_formula(kind, selector, gates, bias):
    """Catches renormalising before top-k, a bias that leaks into gate weights, a lost scale."""
    routing, logits = route(selector, gates, bias=bias)
    chosen, weight = reference(kind, logits, np.asarray(bias or 0.0))
    np.testing.assert_array_equal(routing.expert_A.reshape(T, K), chosen)
    np.testing.assert_allclose(routing.gate_A.reshape(T, K), weight, rtol=2e-5)


def test_topk_then_softmax_equals_renormalised_softmax():
    """Catches a ChosenSoftmaxGates that takes the softmax of probabilities."""
    one, _ = route(TopK(k=K), ChosenSoftmaxGates())
    other, _ = route(TopK(k=K), SoftmaxGates(renormalise=True))
    np.testing.assert_allclose(one.gate_A, other.gate_A, rtol=1e-5)


def test_bias_moves_against_load_and_only_in_training():
    """Catches a bias update of the wrong sign, or one that counts padding."""
    mask_T = jnp.arange(T) < 20
    routing, _ = route(BiasedTopK(k=K, rate=0.1), SigmoidGates(), mask_T=mask_T, train=True)
    counts = np.bincount(np.asarray(routing.expert_A).reshape(T, K)[:20].ravel(), minlength=E)
    np.testing.assert_allclose(
        routing.state["bias"], 0.1 * np.sign(counts.mean() - counts), atol=1e-7
    )
    assert route(BiasedTopK(k=K), SigmoidGates())[0].state is None


def test_bias_alone_balances_a_skewed_router():
    """Catches a bias that never reaches the selection (catalog: DeepSeek-V3, works when)."""
    router = Router(
        RouterSpec(selector=BiasedTopK(k=1, rate=0.02), gates=SigmoidGates()),
        D,
        E,
        0.3,
        rngs=nnx.Rngs(1),
    )
    x_TxD = jax.random.normal(jax.random.key(0), (400, D)).at[:, 0].set(2.0)
    kernel = router.scores["kernel"]
    kernel.set_value(kernel.get_value().at[0, 0].set(1.5))
    graphdef, state = nnx.split(router)

    @jax.jit
    def step(bias):
        module = nnx.merge(graphdef, jax.tree.map(lambda a: bias if a.shape == (E,) else a, state))
        routing = module(x_TxD, RouterContext(train=True))
        return routing.state["bias"], routing.counts_E()

    bias, first = step(jnp.zeros(E))
    for _ in range(150):
        bias, counts = step(bias)
    assert first.max() / first.mean() > 2
    assert counts.max() / counts.mean() < 1.2


@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_their_conventions(masked):
    """Catches top-1 shares counted over all k, layers pooled by mistake, padding that counts."""
    mask = np.arange(T) < 21 if masked else np.ones(T, bool)
    mask_T = jnp.asarray(mask) if masked else None
    a, logits_a = route(TopK(k=K), SoftmaxGates(), mask_T=mask_T)
    b, logits_b = route(TopK(k=1), SoftmaxGates(), mask_T=mask_T)
    shares, means, firsts, z = [], [], [], []
    for routing, logits in ((a, logits_a), (b, logits_b)):
        p, l = softmax(logits)[mask], logits[mask]
        k = routing.per_token
        chosen = np.argsort(-p, -1, kind="stable")[:, :k]
        shares.append(np.bincount(chosen.ravel(), minlength=E) / mask.sum())
        firsts.append(np.bincount(p.argmax(-1), minlength=E) / mask.sum())
        means.append(p.mean(0))
        z.append(np.mean(np.log(np.exp(l).sum(-1)) ** 2))
    pair = (a, b)
    topk = sum(E * (f * m).sum() for f, m in zip(shares, means, strict=True))
    first = sum(E * (f * m).sum() for f, m in zip(firsts, means, strict=True))
    pooled = E * (np.mean(shares, 0) * np.mean(means, 0)).sum()
    np.testing.assert_allclose(TopKLoadBalance(weight=1.0)(pair, mask_T), topk, rtol=1e-5)
    np.testing.assert_allclose(SwitchLoadBalance(weight=1.0)(pair, mask_T), first, rtol=1e-5)
    np.testing.assert_allclose(PooledLoadBalance(weight=1.0)(pair, mask_T), pooled, rtol=1e-5)
    np.testing.assert_allclose(RouterZLoss(weight=0.1)(pair, mask_T), 0.1 * sum(z), rtol=1e-5)


def test_top_k_above_experts_is_refused():
    """Catches a router that silently chooses fewer experts."""
    with pytest.raises(SpecError, match=r"MoESpec.experts = 2 .*\n.*chooses 3"):
        MoESpec(experts=2, width=4, router=RouterSpec(selector=TopK(k=3), gates=SoftmaxGates()))


@pytest.mark.parametrize("gates", [SoftmaxGates(), SigmoidGates()])
def test_gate_entropy_is_the_mean_of_tokens_that_count(gates):
    """Catches the entropy of the mean, of chosen gates alone, in bits, a mean over layers, and
    padding that counts."""
    mask_T = jnp.arange(T) < 20
    routing, logits = route(TopK(k=K), gates, mask_T=mask_T)
    p = softmax(logits) if isinstance(gates, SoftmaxGates) else 1 / (1 + np.exp(-logits))
    p = p / p.sum(1, keepdims=True)
    wanted = -(p * np.log(p)).sum(1)[:20].mean()
    found = GateEntropy(weight=0.5)((routing, routing), mask_T)
    np.testing.assert_allclose(found, 0.5 * 2 * wanted, rtol=1e-5)


def test_a_sure_router_has_no_entropy_and_a_finite_gradient():
    """Catches 0 log 0, and a gradient that makes a router less sure."""
    logits_TxE = jnp.asarray([[300.0, 0.0, -300.0], [1.0, 0.5, 0.0]])

    def loss(logits_TxE):
        p_TxE = jax.nn.softmax(logits_TxE, axis=-1)
        routing = route(TopK(k=K), SoftmaxGates())[0]
        seen = dataclasses.replace(routing, logits_TxE=logits_TxE, probabilities_TxE=p_TxE)
        return GateEntropy(weight=1.0)((seen,), None)

    slope = np.asarray(jax.grad(loss)(logits_TxE))
    assert np.isfinite(slope).all() and not slope[0].any()
    assert slope[1, 0] < 0 < slope[1, 2]  # descent lifts the best logit
