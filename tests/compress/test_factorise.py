"""Low rank as a pass: ranks, buckets, errors before any work, and what each method promises."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.calibrate import SecondMoments
from moejax.checkpoint import load_model, save_model
from moejax.compress import (
    ActivationScaledSVD,
    CompensatedGrid,
    Factorise,
    Frequency,
    FrequencyCost,
    KurtosisRanks,
    LossIncrease,
    LowRankAndRows,
    PlainSVD,
    ProportionalRanks,
    Quantize,
    RankBudget,
    UniformRank,
    WeightError,
    WhitenedSVD,
    check_recipe,
)
from moejax.core import MoejaxError, SpecError
from moejax.jobs.model_plan import model_bytes_per_device
from moejax.mesh import MeshSpec
from moejax.models import parameters, with_parameters
from moejax.weights import AsymmetricGrid, Buckets, HQQGrid, LowRank, RowPatch, Sum
from tests.compress.conftest import EXPERTS, LAYERS, MATRICES, apply, logits

EXACT = PlainSVD(stored="float32")
RANK_3 = Factorise(ranks=UniformRank(rank=3), method=EXACT)
TWO_RANKS = Factorise(
    ranks=RankBudget(mean_rank=6, ranks=(4, 8), cost=FrequencyCost(), shards=3), method=EXACT
)
WHITENED = Factorise(
    ranks=UniformRank(rank=8), method=WhitenedSVD(least_tokens=0.0, stored="float32")
)
SCALED = Factorise(
    ranks=UniformRank(rank=8), method=ActivationScaledSVD(least_tokens=0.0, stored="float32")
)
PLAIN = Factorise(ranks=UniformRank(rank=8), method=EXACT)
ROWS = Factorise(ranks=UniformRank(rank=4), method=LowRankAndRows(rows_kept=0.25))
MILO = Factorise(
    ranks=KurtosisRanks(shift=1, most=16),
    method=CompensatedGrid(
        grid=HQQGrid(bits=3, group=16),
        factors=AsymmetricGrid(bits=4, group=None),
        iterations=2,
    ),
    parameters="layers.0.moe.experts.[ud]*",
)


def planted(model, rank):
    """The model with every expert matrix cut to a rank."""
    named = {
        name: weights.truncated_svd(w, rank).materialize() if ".moe.experts." in name else w
        for name, w in parameters(model).items()
    }
    return with_parameters(model.spec, named)


def banks(model):
    return {n: w for n, w in parameters(model).items() if ".moe.experts." in n}


def test_planted_ranks_lose_nothing(model, text, source):
    """Catches factors of the transpose, lost singular values, experts in another order."""
    low = planted(model, 3)
    after, ledger = apply(low, [RANK_3], source)
    np.testing.assert_allclose(logits(after, text), logits(low, text), atol=1e-4)
    assert all(isinstance(w, LowRank) for w in banks(after).values())
    assert max(row.relative_error for row in ledger) < 1e-5
    assert len(list(ledger)) == LAYERS * EXPERTS * MATRICES


def test_ranks_in_proportion_to_frequency(model, source):
    """Catches shares of another layer, and a floor around the share alone, which is zero."""
    score = Frequency()
    policy = ProportionalRanks(mean_rank=6, score=score)
    stats, shapes = source(model, score.needs()), {1: {"moe.experts.up": (EXPERTS, 32, 48)}}
    counts = np.float64(stats.of(1, score.needs()[0]))
    share = counts / counts.sum()
    want = np.clip(np.floor(share * 6 * EXPERTS + 1e-9), 1, 32)
    found = policy.decide(stats, model, shapes)[1]["moe.experts.up"]
    np.testing.assert_array_equal(found, want)
    assert len(set(found)) > 1
    near = dataclasses.replace(policy, rounding="nearest", least=0)
    want = np.clip(np.floor(share * 6 * EXPERTS + 0.5), 0, 32)
    np.testing.assert_array_equal(near.decide(stats, model, shapes)[1]["moe.experts.up"], want)


def test_experts_in_another_order_keep_the_function(model, text, source):
    """Catches buckets whose experts the router no longer meets, ranks that the solver did not
    choose, and a mean above the budget."""
    low = planted(model, 4)
    after, _ = apply(low, [TWO_RANKS], source)
    for w in banks(after).values():
        assert isinstance(w, Buckets) and [part.u.shape[-1] for part in w.parts] == [4, 8]
        assert w.sizes == (EXPERTS // 2, EXPERTS // 2)
    np.testing.assert_allclose(logits(after, text), logits(low, text), atol=1e-4)


def test_whitening_lowers_the_output_error_of_every_expert(applied, model, source):
    """Catches whitening by moments of another matrix, and S where its transpose belongs."""
    after, ledger = applied(WHITENED)
    plain, _ = applied(PLAIN)
    scaled, _ = applied(SCALED)
    need = tuple(SecondMoments(tap=tap) for tap in ("expert_input", "expert_hidden"))
    found = source(model, need)
    ratios = []
    for row in ledger:
        name = f"layers.{row.layer}.{row.matrix}"
        H = np.float64(found.of(row.layer, need[row.matrix.endswith("down")])[row.expert])
        w = np.float64(parameters(model)[name][row.expert])

        def energy(other, name=name, row=row, w=w, H=H):
            near = np.float64(weights.materialize(parameters(other)[name])[row.expert])
            return np.sqrt(max(np.trace((near - w).T @ H @ (near - w)), 0))

        whole = np.sqrt(np.trace(w.T @ H @ w))
        if row.tokens > 8:
            assert row.output_error == pytest.approx(energy(after) / whole, rel=1e-2, abs=1e-4)
            assert energy(after) <= energy(plain) * 1.001 + 1e-6
            assert energy(after) <= energy(scaled) * 1.001 + 1e-6
            ratios.append(energy(after) / energy(plain))
    assert np.mean(ratios) < 0.95


def test_experts_with_few_tokens_get_the_plain_svd(applied):
    """Catches moments of three tokens that decide 32 directions, and a fallback nobody counts."""
    method = WhitenedSVD(least_tokens=1.0, stored="float32")
    after, ledger = applied(Factorise(ranks=UniformRank(rank=8), method=method))
    plain, _ = applied(PLAIN)
    few = [row for row in ledger if row.tokens < 32]
    assert 0 < len(few) < len(list(ledger))
    for row in few:
        assert row.fallback and not row.calibrated
        name = f"layers.{row.layer}.{row.matrix}"
        near, wanted = (
            weights.materialize(parameters(m)[name])[row.expert] for m in (after, plain)
        )
        np.testing.assert_allclose(near, wanted, atol=1e-4)


def test_a_sparse_part_keeps_the_channels_that_count(applied, model):
    """Catches the residual added to rows that are stored whole, and channels of least
    importance."""
    after, ledger = applied(ROWS)
    for name, w in banks(after).items():
        assert isinstance(w, RowPatch)
        exact, near = np.asarray(parameters(model)[name]), np.asarray(weights.materialize(w))
        for e in range(EXPERTS):
            kept = np.asarray(w.index[e])
            assert len(kept) == round(0.25 * exact.shape[1])
            np.testing.assert_allclose(near[e, kept], exact[e, kept], rtol=2**-8)
    alone, _ = applied(Factorise(ranks=UniformRank(rank=4), method=EXACT))
    low = {
        n: np.asarray(weights.relative_error(parameters(model)[n], w))
        for n, w in banks(alone).items()
    }
    for row in ledger:
        assert row.relative_error < low[f"layers.{row.layer}.{row.matrix}"][row.expert] + 1e-3


def test_tails_decide_ranks_per_matrix(model, source, text):
    """Catches one kurtosis for all matrices of an expert, kurtosis that is not in excess of 3, and
    matrices whose buckets lie in different orders."""
    named = dict(parameters(model))
    up = np.array(named["layers.0.moe.experts.up"])
    up[2, 3, 4] = 16 * up.std()  # a heavy tail in one matrix of one expert
    named["layers.0.moe.experts.up"] = jnp.asarray(up)
    heavy = with_parameters(model.spec, named)
    after, ledger = apply(heavy, [MILO], source)
    ranks = {}
    for name, w in banks(after).items():
        if "layers.0" not in name or name.endswith("gate"):
            continue
        parts = w.parts if isinstance(w, Buckets) else (w,)
        ranks[name] = [
            part.terms[1].u.shape[-1] if isinstance(part, Sum) else 0
            for part in parts
            for _ in range(part.shape[0])
        ]
    tail = ((up - up.mean((1, 2), keepdims=True)) ** 4).mean((1, 2)) / up.var((1, 2)) ** 2 - 3
    want = [0 if t < 1 else min(2 ** (round(t) + 1), 16) for t in tail]
    assert sorted(ranks["layers.0.moe.experts.up"]) == sorted(want) and want[2] > 0
    assert set(ranks["layers.0.moe.experts.down"]) == {0}
    assert np.isfinite(logits(after, text)).all()
    error = {(r.layer, r.matrix, r.expert): r.relative_error for r in ledger}
    assert error[0, "moe.experts.up", 2] < error[0, "moe.experts.up", 1]


@pytest.mark.parametrize("recipe", [TWO_RANKS, ROWS], ids=["ranks", "rows"])
def test_experts_are_cut_over_devices_with_all_their_leaves(applied, recipe):
    """Catches factors, channels or indices that every device holds whole, and buckets that three
    devices cannot share."""
    after, _ = applied(recipe)
    one = model_bytes_per_device(after, MeshSpec())
    experts = sum(weights.nbytes(w) for w in banks(after).values())
    assert model_bytes_per_device(after, MeshSpec(expert=3)) == one - experts + experts // 3


@pytest.mark.parametrize("recipe", [TWO_RANKS, ROWS], ids=["ranks", "rows"])
def test_saved_and_loaded_it_is_the_same_model(applied, recipe, tmp_path, text):
    """Catches factors that lose their format, or bytes that the account does not have."""
    after, _ = applied(recipe)
    save_model(tmp_path / "model", after, dtype=jnp.float32)
    again = load_model(tmp_path / "model", dtype=jnp.float32)
    np.testing.assert_array_equal(logits(again, text), logits(after, text))


def test_loss_scores_find_the_dead_expert(model, source):
    """Catches scores of another expert or layer: one whose output is zero costs what rerouting
    does not mend, one that is needed costs more."""
    named = dict(parameters(model))
    down = np.array(named["layers.1.moe.experts.down"])
    down[:] = 0
    down[4] = np.asarray(named["layers.1.moe.experts.down"])[4] * 50
    named["layers.1.moe.experts.down"] = jnp.asarray(down)
    broken = with_parameters(model.spec, named)
    stats = source(broken, ())
    found = LossIncrease(windows=2).of_model(stats, broken, [1])[1]
    assert np.argmax(np.abs(found)) == 4 and found.shape == (EXPERTS,)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Factorise(ranks=UniformRank(rank=33), method=EXACT), "layers.0.moe.experts"),
        (Factorise(ranks=UniformRank(rank=0), method=EXACT), "layers.0.moe.experts"),
        (Factorise(ranks=KurtosisRanks(), method=EXACT), "KurtosisRanks .*rank 0"),
        (Factorise(ranks=ProportionalRanks(mean_rank=40, score=Frequency()), method=EXACT), "40"),
        (
            Factorise(
                ranks=RankBudget(mean_rank=1, ranks=(2, 4), cost=WeightError()), method=EXACT
            ),
            "layer 0",
        ),
        (Factorise(ranks=UniformRank(rank=2), method=EXACT, parameters="embed"), "embed"),
        (
            Factorise(
                ranks=RankBudget(mean_rank=4, ranks=(2, 4), cost=WeightError()),
                method=EXACT,
                parameters="layers.*.attention.q",
            ),
            "attention",
        ),
        (
            Factorise(
                ranks=UniformRank(rank=8),
                method=CompensatedGrid(
                    grid=HQQGrid(bits=3, group=16), factors=HQQGrid(bits=3, group=24)
                ),
            ),
            "factor of layers.0.moe.experts",
        ),
    ],
)
def test_what_cannot_be_is_said_before_any_work(model, step, words):
    """Catches ranks and groups that are looked at layer by layer, after hours."""
    with pytest.raises(SpecError, match=words):
        check_recipe([step], model)


def test_a_matrix_has_one_format(model):
    """Catches factors of what is quantized already."""
    two = [Quantize(grid=HQQGrid(bits=4, group=16)), RANK_3]
    with pytest.raises(SpecError, match="already stored as Packed"):
        check_recipe(two, model)


def test_moments_that_overflow_are_refused(model):
    """Catches NaN that spread into factors: the matrix is named."""
    w = jnp.ones((2, 4, 4))
    moments = np.full((2, 4, 4), np.nan)
    with pytest.raises(MoejaxError, match=r"layers\.1"):
        weights.whitened_svd(w, moments, 2, name="layers.1.moe.experts.up")
