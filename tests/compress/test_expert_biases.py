"""Recipes on experts with biases and on routers with groups: what is compressed, what stays."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax import weights
from moejax.compress import GPTQ, ExpertDrop, Frequency, LeaveOneOut, MixedPrecision, Quantize
from moejax.compress.accounting import account
from moejax.core import SpecError
from moejax.models import parameters, with_parameters
from moejax.moe import (
    BiasedTopK,
    ChosenSoftmaxGates,
    ClampedSwiGLU,
    GroupLimited,
    LinearScores,
    MoESpec,
    RouterSpec,
    SigmoidGates,
    SigmoidSharedGate,
    TopK,
)
from moejax.weights import AsymmetricGrid
from tests.compress.conftest import EXPERTS, apply, logits
from tests.compress.test_mixed_precision import Fixed
from tests.compress.tiny_moe import make_block, make_inputs
from tests.evaluate.conftest import MIXER, LayerSpec, make_model, make_spec

FOUR, EIGHT = AsymmetricGrid(bits=4, group=16), AsymmetricGrid(bits=8, group=16)
BIASED = MoESpec(
    experts=EXPERTS,
    width=32,
    router=RouterSpec(
        selector=TopK(k=2), gates=ChosenSoftmaxGates(), scores=LinearScores(bias=True)
    ),
    activation=ClampedSwiGLU(),
    expert_bias=True,
    shared_width=16,
    shared_gate=SigmoidSharedGate(),
)
GROUPS = GroupLimited(selector=BiasedTopK(k=2), groups=3, kept=2, best=2)
GROUPED = dataclasses.replace(
    BIASED, router=RouterSpec(selector=GROUPS, gates=SigmoidGates(scale=2.5))
)


def drawn(ffn):
    """A model of one such layer whose biases are not zero."""
    model = make_model(0, make_spec(LayerSpec(mixer=MIXER, ffn=ffn)))
    named = parameters(model)
    for place, name in enumerate(sorted(named)):
        if name.endswith("bias"):
            named[name] = 0.5 * jax.random.normal(jax.random.key(place), named[name].shape)
    return with_parameters(model.spec, named)


@pytest.fixture(scope="module")
def model():
    return drawn(BIASED)


@pytest.mark.parametrize("how", [{"parameters": "layers.*.moe.*"}, {"method": GPTQ()}])
def test_biases_stay_as_they_are(model, source, text, how):
    """Catches [E, F] biases that are taken for matrices, and a shared gate on a grid."""
    after, ledger = apply(model, [Quantize(grid=EIGHT, **how)], source)
    named, before = parameters(after), parameters(model)
    packed = {name for name, w in named.items() if isinstance(w, weights.Format)}
    assert packed >= {f"layers.0.moe.experts.{m}" for m in ("gate", "up", "down")}
    kept = [n for n in named if n.endswith(("bias", "shared_gate"))]
    assert len(kept) == 5 and not packed & set(kept)
    for name in kept:
        np.testing.assert_array_equal(named[name], before[name])
    assert not any(row.matrix.endswith("bias") for row in ledger)
    assert 0 < np.abs(logits(after, text) - logits(model, text)).max() < 0.2


def test_a_bias_is_no_matrix_even_if_it_is_spelled_out(model, source):
    """Catches a grid per expert on something that has no inputs."""
    with pytest.raises(SpecError, match=r"experts\.\w+_bias, a vector"):
        apply(model, [Quantize(grid=FOUR, parameters="*experts.*_bias")], source)


def test_bits_are_of_matrices_and_bytes_of_everything(model):
    """Catches biases that count as weights of 16 bits, or that are stored for nothing."""
    after, named = account(model), parameters(model)
    experts = {n: w.size for n, w in named.items() if ".moe.experts." in n}
    assert after.expert_bytes == 2 * sum(experts.values())
    quantized = {
        name: FOUR(w) if w.ndim == 3 and name in experts else w for name, w in named.items()
    }
    assert account(with_parameters(model.spec, quantized)).code_bits == 4


@pytest.mark.parametrize("ffn", [BIASED, GROUPED], ids=["biased", "grouped"])
def test_precision_may_reorder_experts(source, text, ffn):
    """Catches biases, and groups, that stay behind when experts are sorted by precision."""
    model = drawn(ffn)
    recipe = MixedPrecision(
        grids=(EIGHT, AsymmetricGrid(bits=8, group=32)),
        allocation=Fixed(choice=(1, 0, 1, 0, 0, 1)),
    )
    after, _ = apply(model, [recipe], source)
    moved = np.abs(logits(after, text) - logits(model, text)).max()
    assert 0 < moved < 0.05 * np.abs(logits(model, text)).max()
    bias = "layers.0.moe.experts.up_bias"
    np.testing.assert_array_equal(
        parameters(after)[bias], np.asarray(parameters(model)[bias])[[1, 3, 4, 0, 2, 5]]
    )


def test_experts_of_groups_can_be_dropped(source):
    """Catches groups that are cut anew among the experts that are left."""
    model = drawn(GROUPED)
    after, ledger = apply(model, [ExpertDrop(fraction=0.34, score=Frequency())], source)
    selector = after.spec.layers[0].ffn.router.selector
    dropped = {row.expert for row in ledger if row.dropped}
    kept = [e for e in range(EXPERTS) if e not in dropped]
    assert len(kept) == 4
    group = np.array([e // 2 for e in kept])
    renumbered = np.unique(group, return_inverse=True)[1]
    assert np.array_equal(selector.members or np.arange(4) // 2, renumbered)


def test_leave_one_out_refuses_groups():
    """Catches a score whose router sees five experts in three groups of two."""
    layer = LayerSpec(mixer=MIXER, ffn=GROUPED)
    score = LeaveOneOut(tokens=16)
    stats = {score.needs()[0].name: make_inputs(tokens=16)}
    with pytest.raises(SpecError, match="LeaveOneOut cannot spare"):
        score(0, make_block(layer=layer), stats)
