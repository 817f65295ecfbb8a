"""Pruned matrices: which weights go, what is stored, what the ledger says."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.calibrate import AllTokens, GateWeighted, SecondMoments, collect
from moejax.checkpoint import load_model, payload_bytes, save_model
from moejax.compress import (
    OWL,
    Magnitude,
    SparseGPT,
    Sparsify,
    Wanda,
    account,
    check_recipe,
    touched,
)
from moejax.core import SpecError
from moejax.models import abstract_model, generate, parameters, with_parameters
from moejax.weights import NMSparse, NOfM, PerMatrix, PerOutput, Sparse
from tests.compress.conftest import EXPERTS, HALF, LAYERS, apply, logits

PATTERN = PerOutput(sparsity=0.5)


def matrices(model):
    return {n: w for n, w in parameters(model).items() if ".moe.experts." in n}


def kept(model):
    return {n: np.asarray(weights.materialize(w)) != 0 for n, w in matrices(model).items()}


def test_wanda_is_its_formula(model, applied, text):
    """Catches norms of another expert's inputs, norms squared, and groups along the inputs."""
    after = kept(applied(Sparsify(pattern=PATTERN, method=Wanda()))[0])
    tap = SecondMoments(tap="expert_hidden")
    stats = collect(model, text, (tap,))
    for layer in range(LAYERS):
        name = f"layers.{layer}.moe.experts.down"
        energy_ExK = np.einsum("ekk->ek", stats.of(layer, tap))
        w_ExKxN = np.asarray(parameters(model)[name])
        score = np.abs(w_ExKxN) * np.sqrt(energy_ExK)[..., None]
        seen_E = energy_ExK.any(1)
        assert seen_E.sum() >= 3
        wanted = np.argsort(np.argsort(-score, axis=1), axis=1) < score.shape[1] // 2
        assert np.mean(after[name][seen_E] != wanted[seen_E]) < 0.002  # near ties


def test_equal_gates_leave_wandas_masks(model, source, text):
    """Catches MoE-Pruner's weights that are not a token's own gate: with one expert per token,
    renormalised to 1, nothing may differ from Wanda."""
    selector = dataclasses.replace(model.spec.layers[0].ffn.router.selector, k=1)
    router = dataclasses.replace(model.spec.layers[0].ffn.router, selector=selector)
    layer = dataclasses.replace(
        model.spec.layers[0], ffn=dataclasses.replace(model.spec.layers[0].ffn, router=router)
    )
    single = with_parameters(
        dataclasses.replace(model.spec, layers=(layer,) * LAYERS), parameters(model)
    )
    plain, _ = apply(single, [Sparsify(pattern=PATTERN, method=Wanda())], source)
    gated = Sparsify(pattern=PATTERN, method=Wanda(rows=GateWeighted()))
    weighted, _ = apply(single, [gated], source)
    for name, mask in kept(plain).items():
        np.testing.assert_array_equal(mask, kept(weighted)[name])


def test_gates_count_where_they_differ(applied):
    """Catches a MoE-Pruner that reads Wanda's statistics."""
    plain = kept(applied(Sparsify(pattern=PATTERN, method=Wanda()))[0])
    gated = kept(applied(Sparsify(pattern=PATTERN, method=Wanda(rows=GateWeighted())))[0])
    assert any((plain[name] != mask).any() for name, mask in gated.items())


def test_an_outlier_channel_stays(model, source):
    """Catches magnitude under Wanda's name: channel 3 has small weights and large inputs."""
    named = dict(parameters(model))
    for layer in range(LAYERS):
        norm = f"layers.{layer}.ffn_norm.scale"
        named[norm] = named[norm].at[3].set(400.0)
        for matrix in ("gate", "up"):
            name = f"layers.{layer}.moe.experts.{matrix}"
            named[name] = named[name].at[:, 3].multiply(0.05)
    planted = with_parameters(model.spec, named)
    wanda, ledger = apply(planted, [Sparsify(pattern=PATTERN, method=Wanda())], source)
    size, _ = apply(planted, [Sparsify(pattern=PATTERN, method=Magnitude())], source)
    dead = {(row.layer, row.expert) for row in ledger if row.fallback}
    for layer in range(LAYERS):
        name = f"layers.{layer}.moe.experts.up"
        live = [e for e in range(EXPERTS) if (layer, e) not in dead]
        assert kept(wanda)[name][live, 3].mean() > 0.8 > 0.3 > kept(size)[name][live, 3].mean()
    errors = [(r.output_error, r.nearest_error) for r in ledger if r.output_error is not None]
    assert np.mean([mine < nearest for mine, nearest in errors]) > 0.9


def test_sparse_gpt_loses_less_of_the_outputs(applied):
    """Catches moments that reach the wrong matrix, and weights stored before they are mended."""
    step = Sparsify(pattern=PATTERN, method=SparseGPT(rows=AllTokens(), least_tokens=0.0))
    _, ledger = applied(step)
    found = [(row.output_error, row.nearest_error) for row in ledger]
    assert len(found) == LAYERS * EXPERTS * 3
    assert np.mean([mine < nearest for mine, nearest in found]) > 0.95


def test_experts_without_enough_tokens_are_pruned_by_magnitude(applied):
    """Catches an expert that loses its first inputs because all of its scores are zero."""
    step = Sparsify(pattern=PATTERN, method=SparseGPT(least_tokens=1000.0))
    after, ledger = applied(step)
    wanted = kept(applied(Sparsify(pattern=PATTERN))[0])
    for name, mask in kept(after).items():
        np.testing.assert_array_equal(mask, wanted[name])
    assert {row.fallback for row in ledger} == {"magnitude: too few tokens"}
    assert not any(row.calibrated for row in ledger)


@pytest.mark.parametrize(
    ("pattern", "kind"), [(PATTERN, Sparse), (PerMatrix(sparsity=0.5), Sparse), (NOfM(), NMSparse)]
)
def test_a_pruned_model_is_what_its_plan_says(model, applied, text, tmp_path, pattern, kind):
    """Catches masks that are kept beside dense weights, and models that do not survive saving."""
    step = Sparsify(pattern=pattern)
    after, ledger = applied(step)
    assert all(isinstance(w, kind) for w in matrices(after).values())
    assert account(after, touched(ledger, "arm")).bits_per_weight == 9
    outlined, names = step.outline(abstract_model(model.spec))
    assert payload_bytes(outlined, jnp.bfloat16) == payload_bytes(after, jnp.bfloat16)
    assert set(names) == set(matrices(model))
    rows = list(ledger)
    assert len(rows) == LAYERS * EXPERTS * 3
    assert sum(r.stored_bytes for r in rows) == sum(w.nbytes for w in matrices(after).values())
    save_model(tmp_path / "model", after)
    again = load_model(tmp_path / "model")
    np.testing.assert_array_equal(logits(again, text), logits(after, text))
    prompt = text[0].tokens_BxS[:2, :5]
    np.testing.assert_array_equal(generate(again, prompt, 4), generate(after, prompt, 4))


def test_owl_gives_layers_of_outliers_more(model, source):
    """Catches densities that fall with outliers, and a mean that drifts from the budget."""
    named = dict(parameters(model))
    name = "layers.1.moe.experts.up"
    named[name] = named[name].at[:, ::8, ::4].multiply(12.0)
    planted = with_parameters(model.spec, named)
    step = Sparsify(pattern=OWL(mean=PATTERN, spread=0.1, outlier=4.0), method=Wanda())
    after, _ = apply(planted, [step], source)
    share = [
        np.mean([m.mean() for n, m in kept(after).items() if n.startswith(f"layers.{layer}")])
        for layer in range(LAYERS)
    ]
    assert share[0] == pytest.approx(0.4, abs=0.02) and share[1] == pytest.approx(0.6, abs=0.02)


def test_what_cannot_be_pruned_is_refused(model):
    """Catches work that begins before a pattern is known not to fit."""
    quantized = Sparsify(pattern=PATTERN)
    for recipe, wanted in (
        ([Sparsify(pattern=NOfM(n=3, m=12))], "groups of 12 do not divide the 32 inputs of layers"),
        ([quantized, quantized], "already stored as Sparse"),
        ([Sparsify(pattern=PATTERN, method=Wanda(), parameters="embed")], "Wanda knows no inputs"),
        ([Sparsify(pattern=OWL(mean=PATTERN), parameters="embed")], "OWL knows no inputs of embed"),
        ([Sparsify(pattern=PATTERN, parameters="layers.*.nothing")], "names no parameter"),
    ):
        with pytest.raises(SpecError, match=wanted):
            check_recipe(recipe, model)
    with pytest.raises(SpecError, match=r"OWL.spread = 0.3"):
        OWL(mean=PATTERN, spread=0.3)


def test_drop_and_prune_take_the_same_bytes_in_either_order(applied):
    """Catches a pruned bank that cannot lose experts, and a pass that keeps an old expert count."""
    prune = Sparsify(pattern=PATTERN)
    first, second = applied(prune, HALF)[0], applied(HALF, prune)[0]
    assert payload_bytes(first, jnp.bfloat16) == payload_bytes(second, jnp.bfloat16)


def test_only_the_named_matrices_change(model, source):
    """Catches a glob that is read for one layer and used for all."""
    step = Sparsify(pattern=PATTERN, parameters="layers.1.moe.experts.up")
    after, ledger = apply(model, [step], source)
    changed = [n for n, w in parameters(after).items() if isinstance(w, weights.Format)]
    assert changed == ["layers.1.moe.experts.up"]
    assert {row.layer for row in ledger} == {1}
