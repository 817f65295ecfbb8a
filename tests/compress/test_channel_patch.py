"""Channels that come back after quantization: which ones, what they cost, what they mend."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.calibrate import ByGroup, ExpertCounts, SecondMoments
from moejax.compress import (
    GPTQ,
    ExpertDrop,
    Frequency,
    FullPrecision,
    MixedPrecision,
    Quantize,
    payload,
)
from moejax.compress.channel_patch import BySensitivity, ChannelPatch, RandomChannels
from moejax.core import DataError, SpecError
from moejax.models import abstract_model, parameters
from moejax.weights import AsymmetricGrid, Buckets, RowPatch
from tests.compress.conftest import EXPERTS, LAYERS, MATRICES, Source, apply
from tests.compress.test_mixed_precision import MIXED, TWO, Fixed
from tests.evaluate.conftest import cut, make_tokens

STEP = Quantize(grid=TWO)
SHARE = 0.1  # of 32 inputs: 3
PATCH = ChannelPatch(step=STEP, share=SHARE)
RANDOM = ChannelPatch(step=STEP, share=SHARE, selection=RandomChannels(seed=3))
NAMES = [(layer, matrix) for layer in range(LAYERS) for matrix in ("gate", "up", "down")]
ORDER = [1, 3, 4, 0, 2, 5]  # of experts after MIXED


def bank(model, layer, matrix):
    return parameters(model)[f"layers.{layer}.moe.experts.{matrix}"]


def table(model, layer, matrix):
    """Which channels of each expert came back."""
    patch = bank(model, layer, matrix)
    assert isinstance(patch, RowPatch)
    return np.asarray(patch.index)


def values(weight):
    return np.asarray(weights.materialize(weight), np.float64)


def tap(matrix):
    return "expert_hidden" if matrix == "down" else "expert_input"


@pytest.fixture(scope="module")
def moments(model, text):
    """(layer, matrix) -> second moments [E, K, K] of each expert's rows."""
    wanted = {matrix: SecondMoments(tap=tap(matrix)) for _, matrix in NAMES}
    found = Source(text)(model, tuple(dict.fromkeys(wanted.values())))
    return {(layer, matrix): found.of(layer, wanted[matrix]) for layer, matrix in NAMES}


def most_sensitive(w_KxN, q_KxN, moments_KxK, count):
    """By hand: one channel after the other."""
    scores = []
    for j in range(len(w_KxN)):
        energy = moments_KxK[j, j] if np.trace(moments_KxK) else 1.0
        scores.append(energy * np.sum((w_KxN[j] - q_KxN[j]) ** 2))
    return set(np.argsort(scores)[-count:].tolist())


def damage(model, after, moments):
    """Squared output error over the text, summed over all expert matrices."""
    total = 0.0
    for layer, matrix in NAMES:
        d = values(bank(after, layer, matrix)) - values(bank(model, layer, matrix))
        total += np.einsum("ekn,ekj,ejn->", d, np.float64(moments[layer, matrix]), d)
    return total


def test_the_channels_are_those_of_largest_energy_times_error(model, applied, moments):
    """Catches energies of another expert or matrix, errors of output channels, the least first."""
    (plain, _), (after, ledger) = applied(STEP), applied(PATCH)
    for layer, matrix in NAMES:
        w, q = values(bank(model, layer, matrix)), values(bank(plain, layer, matrix))
        patch = bank(after, layer, matrix)
        assert isinstance(patch, RowPatch)
        for e in range(EXPERTS):
            wanted = most_sensitive(w[e], q[e], moments[layer, matrix][e], 3)
            assert set(np.asarray(patch.index[e]).tolist()) == wanted
            mended = q[e].copy()
            for j in wanted:
                mended[j] = np.asarray(jnp.asarray(w[e, j], jnp.bfloat16), np.float64)
            np.testing.assert_array_equal(values(patch)[e], mended)
            row = next(
                r
                for r in ledger
                if (r.layer, r.matrix, r.expert) == (layer, f"moe.experts.{matrix}", e)
            )
            error = np.linalg.norm(mended - w[e]) / np.linalg.norm(w[e])
            assert row.relative_error == pytest.approx(error, rel=1e-4)
            assert (row.fallback is None) == bool(row.tokens)
    assert len(ledger) == LAYERS * EXPERTS * MATRICES


def test_all_channels_are_the_original_in_bfloat16(model, applied):
    """Catches rows of the quantized weight, or of another expert, in the table."""
    after, _ = applied(ChannelPatch(step=STEP, share=1.0))
    for layer, matrix in NAMES:
        exact = jnp.asarray(bank(model, layer, matrix), jnp.bfloat16)
        np.testing.assert_array_equal(
            weights.materialize(bank(after, layer, matrix), jnp.bfloat16), exact
        )


def test_sensitive_channels_mend_more_than_random_ones(model, applied, moments):
    """Catches a ranking that mends no more than chance, and a patch that the model never uses."""
    none, chance, chosen = (
        damage(model, applied(recipe)[0], moments) for recipe in (STEP, RANDOM, PATCH)
    )
    assert chosen < chance < none
    assert none - chosen > 2 * (none - chance)


def test_random_channels_are_drawn_per_matrix_and_seed(applied):
    """Catches one draw for all experts, or one that a second run does not repeat."""
    after, _ = applied(RANDOM)
    other, _ = applied(ChannelPatch(step=STEP, share=SHARE, selection=RandomChannels(seed=4)))
    drawn = {tuple(row) for l, m in NAMES for row in table(after, l, m).tolist()}
    assert len(drawn) > 0.9 * len(NAMES) * EXPERTS
    assert not np.array_equal(table(after, 0, "up"), table(other, 0, "up"))


def test_a_channel_costs_its_weights_and_its_number(applied):
    """Catches a table in float32, an index in 4 bytes, and bytes that nobody counts."""
    (plain, rows), (after, patched) = applied(STEP), applied(PATCH)
    assert {a.stored_bytes - b.stored_bytes for a, b in zip(patched, rows, strict=True)} == {
        3 * (32 * 2 + 2)
    }
    extra = sum(payload(after).values()) - sum(payload(plain).values())
    assert extra == LAYERS * MATRICES * EXPERTS * 3 * (32 * 2 + 2)
    assert {row.code_bits for row in patched} == {2}


def test_experts_that_were_reordered_get_their_own_rows(model, applied, moments):
    """Catches rows or energies in the order before precisions were sorted."""
    after, ledger = applied(ChannelPatch(step=MIXED, share=SHARE))
    plain, _ = applied(MIXED)
    for layer, matrix in NAMES:
        patched = bank(after, layer, matrix)
        assert isinstance(patched, Buckets) and patched.sizes == (3, 3)
        patches = [part for part in patched.parts if isinstance(part, RowPatch)]
        assert len(patches) == 2
        w, q = values(bank(model, layer, matrix))[ORDER], values(bank(plain, layer, matrix))
        index = np.concatenate([np.asarray(part.index) for part in patches])
        for place in range(EXPERTS):
            wanted = most_sensitive(w[place], q[place], moments[layer, matrix][ORDER[place]], 3)
            assert set(index[place].tolist()) == wanted
            changed = np.any(values(patched)[place] != q[place], axis=1)
            assert set(np.flatnonzero(changed).tolist()) <= wanted
    errors = {(r.layer, r.matrix, r.expert): r.relative_error for r in ledger}
    w, now = values(bank(model, 0, "up"))[ORDER], values(bank(after, 0, "up"))
    for place, expert in enumerate(ORDER):
        error = np.linalg.norm(now[place] - w[place]) / np.linalg.norm(w[place])
        assert errors[0, "moe.experts.up", expert] == pytest.approx(error, rel=1e-4)


def test_experts_in_full_precision_have_nothing_to_get_back(applied):
    """Catches a table beside weights that are exact already."""
    mixed = MixedPrecision(
        grids=(FullPrecision(), TWO), allocation=Fixed(choice=(0, 0, 1, 1, 1, 1))
    )
    after, ledger = applied(ChannelPatch(step=mixed, share=SHARE))
    whole, low = bank(after, 0, "up").parts
    assert isinstance(whole, weights.Format) is False and isinstance(low, RowPatch)
    assert {r.stored_bytes for r in ledger if r.expert < 2} == {32 * 32 * 2}


@pytest.mark.parametrize("step", [STEP, MIXED])
def test_the_outline_is_what_comes_of_it(applied, model, step):
    """Catches plans with other bytes than runs."""
    patch = ChannelPatch(step=step, share=SHARE)
    outlined, names = patch.outline(abstract_model(model.spec))
    after, _ = applied(patch)
    assert payload(outlined) == payload(after)
    assert len(names) == LAYERS * MATRICES


def test_a_group_ranks_by_its_own_text(model):
    """Catches moments of all of the text under the name of a group."""
    source = Source(cut({"docs": make_tokens(75, 0), "code": 63 - make_tokens(50, 1)}, 5))
    plain, _ = apply(model, [STEP], source)
    by_code = ChannelPatch(step=STEP, share=SHARE, selection=BySensitivity(group="code"))
    after, _ = apply(model, [by_code], source)
    everything = SecondMoments(tap="expert_input")
    by_group = ByGroup(of=everything, groups=("docs", "code"))
    found = source(model, (everything, by_group))
    of_code, of_all = found.of(0, by_group)[1], found.of(0, everything)
    w, q = values(bank(model, 0, "up")), values(bank(plain, 0, "up"))
    index = table(after, 0, "up")
    wanted = [most_sensitive(w[e], q[e], of_code[e], 3) for e in range(EXPERTS)]
    assert [set(i.tolist()) for i in index] == wanted
    assert wanted != [most_sensitive(w[e], q[e], of_all[e], 3) for e in range(EXPERTS)]


def test_gptq_keeps_its_statistics(applied):
    """Catches a wrapper that forgets what its step needs, and output errors from before it."""
    step = Quantize(grid=TWO, method=GPTQ(least_tokens=8.0))
    patch = ChannelPatch(step=step, share=SHARE)
    (_, inner), (after, ledger) = applied(step), applied(patch)
    for before, now in zip(inner, ledger, strict=True):
        assert now.relative_error < before.relative_error
        assert now.output_error is None and now.nearest_error is None
        assert before.fallback is None or before.fallback in now.fallback
    assert isinstance(bank(after, 1, "down"), RowPatch)


def test_what_cannot_be_patched_is_refused(model, source):
    """Catches a patch of nothing, a share of more than all, and a group without text."""
    for share in (0.0, -0.1, 1.5):
        with pytest.raises(SpecError, match="share"):
            ChannelPatch(step=STEP, share=share)
    steps = (
        Quantize(grid=TWO, parameters="layers.*.attention.?"),
        Quantize(grid=FullPrecision()),
        ExpertDrop(fraction=0.5, score=Frequency()),
    )
    for step in steps:
        with pytest.raises(SpecError, match="quantizes no expert"):
            apply(model, [ChannelPatch(step=step)], source)
    assert not source.asked
    strange = ChannelPatch(step=STEP, selection=BySensitivity(group="poems"))
    with pytest.raises(DataError, match="poems"):
        apply(model, [strange], source)


def test_it_asks_for_its_own_statistics_and_for_those_of_its_step(model):
    """Catches a ranking on statistics that were never collected."""
    step = Quantize(grid=AsymmetricGrid(bits=2, group=16), method=GPTQ())
    asked = ChannelPatch(step=step, selection=BySensitivity(group="code")).layer_needs(model.spec)
    moments = [SecondMoments(tap=name) for name in ("expert_input", "expert_hidden")]
    for accumulator in (*moments, *(ByGroup(of=m, groups=("code",)) for m in moments)):
        assert accumulator in asked
    assert ExpertCounts() in asked
    quiet = ChannelPatch(step=STEP, selection=RandomChannels())
    assert quiet.layer_needs(model.spec) == ()
