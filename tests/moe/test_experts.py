"""Expert banks, activations and shared experts against NumPy, expert by expert."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import SpecError, compat, from_json, taps, to_json
from moejax.core.taps import NOTHING
from moejax.moe import (
    GELU,
    ClampedSwiGLU,
    GatedExperts,
    GatedFFN,
    MoELayer,
    MoESpec,
    NestedSwiGLU,
    ReLU,
    RouterContext,
    RouterSpec,
    SigmoidSharedGate,
    SiLU,
    SoftmaxGates,
    TopK,
)

E, D, F = 4, 6, 5
ROUTER = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_exact(x):
    return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def clamped(gate, up):
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return (up + 1) * gate * sigmoid(1.702 * gate)


ACTIVATIONS = {
    "SwiGLU": (SiLU(), lambda gate, up: gate * sigmoid(gate) * up),
    "GEGLU": (GELU(), lambda gate, up: gelu_exact(gate) * up),
    "Grok-1": (GELU(approximate=True), lambda gate, up: gelu_tanh(gate) * up),
    "ReGLU": (ReLU(), lambda gate, up: np.maximum(gate, 0) * up),
    "gpt-oss": (ClampedSwiGLU(), clamped),
    "OpenMoE": (
        NestedSwiGLU(),
        lambda gate, up: gate[:, :F] * gate[:, F:] * sigmoid(gate[:, F:]) * up,
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activations_equal_their_formulas(name):
    """Catches gate and up swapped, silu on the wrong half, clamps on the wrong side, exact GELU.

    Entries go up to 10, where gpt-oss clamps, and GELU and its tanh form differ by 4e-4.
    """
    activation, formula = ACTIVATIONS[name]
    draws = np.random.default_rng(0)
    gate = draws.normal(scale=4, size=(60, F * activation.gate_blocks))
    up = draws.normal(scale=4, size=(60, F))
    gate[:2], up[:3] = 10.0, -10.0
    got = activation.gated(jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
    np.testing.assert_allclose(got, formula(gate, up), rtol=2e-5, atol=2e-5)
    assert from_json(to_json(activation)) == activation


def bank(activation, bias):
    """Experts whose biases are drawn too."""
    experts = GatedExperts(E, D, F, activation, 0.5, bias=bias, rngs=nnx.Rngs(0))
    for i, variable in enumerate((experts.gate_bias, experts.up_bias, experts.down_bias)):
        if variable is not None:
            shape = compat.read(variable).shape
            compat.write(variable, jax.random.normal(jax.random.key(i), shape))
    return experts


def read(variable):
    return np.asarray(compat.read(variable), np.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["SwiGLU", "gpt-oss", "OpenMoE"])
def test_each_row_meets_its_own_expert(name, bias):
    """Catches biases of a neighbouring expert after an empty group, and rows of no group that get
    the last expert's bias."""
    activation, formula = ACTIVATIONS[name]
    experts = bank(activation, bias)
    sizes, rows = [3, 0, 4, 1], 11  # three rows belong to no group
    x = np.random.default_rng(1).normal(size=(rows, D))
    y_RxD, found = experts(
        jnp.asarray(x, jnp.float32), jnp.array(sizes, jnp.int32), frozenset({taps.EXPERT_HIDDEN})
    )
    expected, hidden = np.zeros((rows, D)), np.zeros((rows, F))
    for row, e in enumerate(np.repeat(np.arange(E), sizes)):
        gate, up = x[row] @ read(experts.gate)[e], x[row] @ read(experts.up)[e]
        if bias:
            gate, up = gate + read(experts.gate_bias)[e], up + read(experts.up_bias)[e]
        hidden[row] = formula(gate[None], up[None])[0]
        expected[row] = hidden[row] @ read(experts.down)[e]
        expected[row] += read(experts.down_bias)[e] if bias else 0
    np.testing.assert_allclose(y_RxD, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found[taps.EXPERT_HIDDEN], hidden, rtol=2e-5, atol=2e-5)
    ffn = GatedFFN(D, F, activation, 0.5, rngs=nnx.Rngs(2))
    gate, up = x @ read(ffn.gate), x @ read(ffn.up)
    dense = ffn(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(dense, formula(gate, up) @ read(ffn.down), rtol=2e-5, atol=2e-5)


def test_biases_follow_the_compute_dtype():
    """Catches float32 biases that widen bfloat16 activations."""
    y_RxD, _ = bank(ClampedSwiGLU(), True)(
        jnp.ones((4, D), jnp.bfloat16), jnp.array([1, 1, 1, 1], jnp.int32), NOTHING
    )
    assert y_RxD.dtype == jnp.bfloat16


def names_and_shapes(module):
    return {
        ".".join(map(str, path)): node.get_value().shape
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }


def test_parameters_have_their_canonical_names():
    """Catches names that checkpoints and importers do not know."""
    spec = MoESpec(
        experts=E,
        width=F,
        router=ROUTER,
        activation=NestedSwiGLU(),
        shared_width=3,
        shared_gate=SigmoidSharedGate(),
        expert_bias=True,
    )
    assert names_and_shapes(MoELayer(spec, D, 0.5, rngs=nnx.Rngs(0))) == {
        "router.scores.kernel": (D, E),
        "experts.gate": (E, D, 2 * F),
        "experts.up": (E, D, F),
        "experts.down": (E, F, D),
        "experts.gate_bias": (E, 2 * F),
        "experts.up_bias": (E, F),
        "experts.down_bias": (E, D),
        "shared.gate": (D, 6),
        "shared.up": (D, 3),
        "shared.down": (3, D),
        "shared_gate": (D, 1),
    }


def test_a_shared_gate_weighs_each_token():
    """Catches a gate on the routed output, one scalar for all tokens, and a softmax over one."""
    spec = MoESpec(
        experts=E, width=F, router=ROUTER, shared_width=3, shared_gate=SigmoidSharedGate()
    )
    module = MoELayer(spec, D, 0.8, rngs=nnx.Rngs(0))
    x_TxD = jax.random.normal(jax.random.key(1), (9, D))
    y_TxD, _, _ = module(x_TxD, RouterContext(), NOTHING)
    gate = sigmoid(np.asarray(x_TxD, np.float64) @ read(module.shared_gate))
    assert gate.shape == (9, 1) and np.ptp(gate) > 0.2
    added, _ = module.shared_output(x_TxD)
    np.testing.assert_allclose(added, gate * np.asarray(module.shared(x_TxD)), rtol=1e-5)
    module.shared = None
    routed, _, _ = module(x_TxD, RouterContext(), NOTHING)
    np.testing.assert_allclose(y_TxD, routed + added, atol=1e-6)


def test_a_shared_gate_without_shared_experts_is_refused():
    """Catches a gate that weighs nothing."""
    with pytest.raises(SpecError, match="shared_gate = SigmoidSharedGate"):
        MoESpec(experts=E, width=F, router=ROUTER, shared_gate=SigmoidSharedGate())
