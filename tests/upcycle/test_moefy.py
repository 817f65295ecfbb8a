"""MoEfication keeps the function with all experts on, and only then."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import weights
from moejax.calibrate import Calibration
from moejax.checkpoint import load_model, save_model
from moejax.compress import ExpertDrop, Frequency, Quantize, compress
from moejax.core import SpecError
from moejax.data import windows
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    LayerSpec,
    ModelSpec,
    count_parameters,
    forward,
    parameters,
    with_parameters,
)
from moejax.moe import ChosenSoftmaxGates, MoESpec, RouterSpec, TopK
from moejax.runs import Ledger
from moejax.upcycle import (
    BalancedKMeans,
    CentreRouting,
    Contiguous,
    RandomSplit,
    ZeroRouting,
    moefied_spec,
    moefy,
)
from moejax.weights import SymmetricGrid

E, WIDTH = 6, 96
TOKENS = np.arange(48).reshape(2, 24) * 11 % 50


@pytest.fixture(scope="module")
def dense() -> DecoderLM:
    """Two dense layers whose feed-forwards matter as much as the residual stream."""
    mixer = AttentionSpec(heads=2, kv_heads=1, head_width=16)
    layer = LayerSpec(mixer=mixer, ffn=DenseSpec(width=WIDTH))
    spec = ModelSpec(vocab=50, width=32, layers=(layer, layer), init_scale=0.25)
    return DecoderLM(spec, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("start", [CentreRouting(), ZeroRouting()])
@pytest.mark.parametrize("split", [Contiguous(), RandomSplit(), BalancedKMeans()])
def test_all_experts_on_is_the_dense_model(dense, start, split):
    """Catches rows of down in another order than columns of gate and up, a neuron in two experts,
    and gates whose sum is 1 (scale E / k instead of E)."""
    moe = moefy(dense, E, E, split=split, start=start)
    assert {type(layer.ffn) for layer in moe.spec.layers} == {MoESpec}
    assert _difference(dense, moe) < 1e-5


@pytest.mark.parametrize("start", [CentreRouting(), ZeroRouting()])
def test_the_bound_would_see_a_wrong_model(dense, start):
    """Catches a feed-forward so small that any split passes: an expert off or two exchanged parts
    move the logits by 100 times the bound and more."""
    assert _difference(dense, moefy(dense, E, E - 1, split=Contiguous(), start=start)) > 1e-3
    moe = moefy(dense, E, E, split=Contiguous(), start=start)
    named = parameters(moe)
    down = named["layers.1.moe.experts.down"]
    named["layers.1.moe.experts.down"] = down[jnp.asarray([1, 0, *range(2, E)])]
    assert _difference(dense, with_parameters(moe.spec, named)) > 1e-3


def test_softmax_gates_need_the_scale_of_all_experts(dense):
    """Catches the belief that E / k keeps the function: it is 1 where all are on."""
    moe = moefy(dense, E, E, start=ZeroRouting(), split=Contiguous())
    gates = ChosenSoftmaxGates(scale=1.0)
    layers = tuple(
        dataclasses.replace(
            layer,
            ffn=dataclasses.replace(layer.ffn, router=RouterSpec(selector=TopK(k=E), gates=gates)),
        )
        for layer in moe.spec.layers
    )
    spec = dataclasses.replace(moe.spec, layers=layers)
    assert _difference(dense, with_parameters(spec, parameters(moe))) > 1e-2


def test_the_size_stays_but_for_routers(dense):
    """Catches experts that are copies, and neurons lost."""
    moe = count_parameters(moefied_spec(dense.spec, E, 2))
    base = count_parameters(dense.spec)
    assert moe.total == base.total + 2 * 32 * E
    assert moe.total - moe.active == 2 * (E - 2) * 3 * 32 * WIDTH // E


def test_tokens_go_where_their_neurons_are():
    """Catches a router that prefers the experts whose gate vectors point away."""
    gate = np.zeros((2, 4, 3), np.float32)
    gate[0, 0], gate[1, 1] = 5.0, 0.1
    kernel = np.asarray(CentreRouting().kernel(jnp.asarray(gate)))
    np.testing.assert_allclose(kernel, np.eye(4, 2), atol=1e-6)


def test_what_cannot_be_split_is_refused(dense):
    """Catches an uneven split, a MoE split again, and codes torn apart."""
    with pytest.raises(SpecError, match="experts = 7 do not divide the hidden width 96"):
        moefy(dense, 7, 1)
    with pytest.raises(SpecError, match="no dense feed-forward"):
        moefy(moefy(dense, E, 2, split=Contiguous()), E, 2)
    with pytest.raises(SpecError):
        moefy(dense, E, E + 1)
    named = parameters(dense)
    grid = SymmetricGrid(bits=4, group=32)
    named["layers.0.ffn.up"] = grid(named["layers.0.ffn.up"][None]).take(0)
    with pytest.raises(SpecError, match=r"layers\.0\.ffn\.up is Packed"):
        moefy(with_parameters(dense.spec, named), E, 2)


def test_recipes_run_on_it_and_it_saves(dense, tmp_path):
    """Catches a split model that passes refuse, and gates or routers lost on disk."""
    moe = moefy(dense, E, 3)
    batches = list(windows(TOKENS.reshape(-1), 24, 2, group="text"))
    recipe = (
        ExpertDrop(score=Frequency(), fraction=1 / 3),
        Quantize(grid=SymmetricGrid(bits=4, group=16)),
    )
    ledger = Ledger()
    made = compress(
        moe, recipe, Calibration(batches), key=jax.random.key(0), arm="moefied", ledger=ledger
    )
    assert {layer.ffn.experts for layer in made.spec.layers} == {4}
    experts = parameters(made)["layers.0.moe.experts.gate"]
    assert isinstance(experts, weights.Packed)
    save_model(tmp_path / "model", made)
    loaded = load_model(tmp_path / "model", spec=made.spec)
    assert _difference(made, loaded) == 0.0


def _difference(one: DecoderLM, other: DecoderLM) -> float:
    """Largest difference of logits, as a part of the largest logit."""
    a, b = (np.asarray(_logits(model)) for model in (one, other))
    return float(np.abs(a - b).max() / np.abs(a).max())


def _logits(model: DecoderLM) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        return _run(*nnx.split(model))


@functools.partial(jax.jit, static_argnames="graphdef")  # compiled once per structure
def _run(graphdef, state):
    return forward(nnx.merge(graphdef, state), TOKENS.astype(np.int32)).logits_BxSxV
