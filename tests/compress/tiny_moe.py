"""One tiny MoE block, its inputs, what calibration would say of them, and its formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import weights
from moejax.calibrate import CoActivation, ExpertCounts, LayerInputs, ProbabilityMass, SoftCounts
from moejax.compress.block_weights import block_weights, expert_matrices, with_block_weights
from moejax.core.taps import NOTHING
from moejax.models import layers
from moejax.moe import RouterContext
from tests.evaluate.conftest import make_model, make_spec, routed

EXPERTS, WIDTH, TOKENS = 6, 32, 40


@functools.cache
def make_block(seed=0, layer=None):
    """Made once for all tests; nobody writes into it."""
    return layers(make_model(seed, make_spec(layer or routed(experts=EXPERTS))))[0]


def make_inputs(seed=0, tokens=TOKENS):
    return np.random.default_rng(seed).normal(size=(tokens, WIDTH)).astype(np.float32)


def preferring(block, preference_E):
    """The block whose router adds a preference to the logits of inputs with x_0 = 1."""
    name = "moe.router.scores.kernel"
    kernel = np.array(block_weights(block)[name])
    kernel[0] = preference_E
    return with_block_weights(block, {name: jnp.asarray(kernel)})


def scaled(block, scale_E, matrix="moe.experts.down"):
    """The block with a matrix of each expert scaled."""
    w = block_weights(block)[matrix]
    return with_block_weights(block, {matrix: w * jnp.asarray(scale_E)[:, None, None]})


def mixed(block, grids, choice_E):
    """The block with each expert rounded to its grid, as plain arrays."""
    named, chosen = block_weights(block), jnp.asarray(choice_E)
    changed = {}
    for m in expert_matrices(block):
        near = jnp.stack([weights.materialize(grid(named[m])) for grid in grids])
        changed[m] = near[chosen, jnp.arange(len(chosen))]
    return with_block_weights(block, changed)


def output(block, x_TxD):
    """Y [T, D] of the routed layer alone."""
    return np.asarray(_output(*nnx.split(block.moe), x_TxD), np.float64)


@functools.partial(jax.jit, static_argnames="graphdef")
def _output(graphdef, state, x_TxD):
    return nnx.merge(graphdef, state)(x_TxD, RouterContext(), NOTHING)[0]


def routing(block, x_TxD, k=2):
    """Chosen experts, renormalised gates, and probabilities of all: NumPy, float64."""
    kernel = np.asarray(block_weights(block)["moe.router.scores.kernel"], np.float64)
    logits = x_TxD.astype(np.float64) @ kernel
    p_TxE = np.exp(logits - logits.max(1, keepdims=True))
    p_TxE /= p_TxE.sum(1, keepdims=True)
    expert_TxK = np.argsort(-p_TxE, axis=1, kind="stable")[:, :k]
    p_TxK = np.take_along_axis(p_TxE, expert_TxK, 1)
    return expert_TxK, p_TxK / p_TxK.sum(1, keepdims=True), p_TxE


def experts_of(block):
    """gate, up, down [E, K, N] in float64."""
    named = block_weights(block)
    return [np.asarray(named[f"moe.experts.{m}"], np.float64) for m in ("gate", "up", "down")]


def numpy_output(x_TxD, routed_by, gate, up, down):
    """Y from the formula, token by token."""
    expert_TxK, gate_TxK, _ = routed_by
    y = np.zeros(x_TxD.shape)
    for t, x in enumerate(x_TxD.astype(np.float64)):
        for e, g in zip(expert_TxK[t], gate_TxK[t], strict=True):
            a = x @ gate[e]
            y[t] += g * ((a / (1 + np.exp(-a)) * (x @ up[e])) @ down[e])
    return y


def statistics(block, x_TxD, tokens=2048):
    """What calibration on these inputs would find."""
    expert_TxK, _, p_TxE = routing(block, x_TxD)
    chosen_TxE = np.zeros(p_TxE.shape)
    np.put_along_axis(chosen_TxE, expert_TxK, 1, 1)
    return {
        ExpertCounts().name: chosen_TxE.sum(0).astype(np.int64),
        ProbabilityMass().name: (chosen_TxE * p_TxE).sum(0),
        SoftCounts().name: p_TxE.sum(0),
        CoActivation().name: chosen_TxE.T @ chosen_TxE,
        LayerInputs(tokens=tokens).name: x_TxD,
    }
