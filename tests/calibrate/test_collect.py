"""Statistics against a recount by hand."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import ExpertCounts, GateMass, SoftCounts, Tokens, collect, stream
from moejax.core import DataError, MoejaxError, compat, spec, taps
from moejax.moe import MoESpec
from tests.evaluate.conftest import cut, dense, make_model, make_spec, make_tokens, padded, routed
from tests.evaluate.conftest import run as forward

ALL = (ExpertCounts(), GateMass(), SoftCounts())


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def tokens():
    return make_tokens(75)


@pytest.fixture(scope="module")
def found(model, tokens):
    return collect(model, cut({"docs": tokens}, 3), ALL)


def test_statistics_are_those_of_a_recount(model, tokens, found):
    """Catches padding that counts, probabilities for gates, and layers in another order."""
    for layer in range(2):
        counts, mass, soft = Counter(), np.zeros(6), np.zeros(6)
        for batch in cut({"docs": tokens}, 1):
            routing = forward(model, batch).routings[layer]
            for t in np.flatnonzero(batch.mask_BxS[0]):
                soft += np.asarray(routing.probabilities_TxE[t], np.float64)
                for a in (2 * t, 2 * t + 1):
                    counts[int(routing.expert_A[a])] += 1
                    mass[int(routing.expert_A[a])] += float(routing.gate_A[a])
        assert found.of(layer, ExpertCounts()).dtype == np.int64
        assert found.of(layer, ExpertCounts()).tolist() == [counts[e] for e in range(6)]
        np.testing.assert_allclose(found.of(layer, GateMass()), mass, rtol=1e-5)
        np.testing.assert_allclose(found.of(layer, SoftCounts()), soft, rtol=1e-5)
        # Gates are renormalised over two experts, so their mass is one per token; so is that of p.
        assert found.of(layer, GateMass()).sum() == pytest.approx(75, rel=1e-5)
        assert found.of(layer, SoftCounts()).sum() == pytest.approx(75, rel=1e-5)
    assert found.tokens == 75


def test_batches_and_padding_change_no_count(model, tokens, found):
    """Catches statistics of the last batch only, and padding that experts see."""
    other = collect(model, [padded(b, 1, 3) for b in cut({"docs": tokens}, 2)], ALL)
    assert other.tokens == found.tokens
    for mine, theirs in zip(other.layers, found.layers, strict=True):
        np.testing.assert_array_equal(mine["expert_counts"], theirs["expert_counts"])
        for name in ("gate_mass", "soft_counts"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5)


@pytest.mark.parametrize("accumulator", ALL)
def test_two_streams_merge_into_one(model, tokens, accumulator):
    """Catches a merge that forgets one side."""
    layer, batches = model.spec.layers[0], cut({"docs": tokens}, 1)

    def after(some):
        state = accumulator.init(layer, model.spec)
        for batch in some:
            found = forward(model, batch).taps[0]
            mask_T = jnp.asarray(batch.mask_BxS.reshape(-1))
            tokens = Tokens(mask_T, jnp.arange(mask_T.size), jnp.uint32(0))
            state = accumulator.update(state, found, tokens)
        return state

    both = accumulator.merge(after(batches[:2]), after(batches[2:]))
    whole = accumulator.finalize(after(batches))
    np.testing.assert_allclose(accumulator.finalize(both), whole, rtol=1e-5)


@spec
class InputMoments:
    """Sum of x x^T over the rows of each expert: float64 [E, D, D]."""

    name = "input_moments"
    request = frozenset({taps.EXPERT_INPUT, taps.DISPATCH})

    def init(self, layer, model):
        if not isinstance(layer.ffn, MoESpec):
            return None
        return jnp.zeros((layer.ffn.experts, model.width, model.width), jnp.float32)

    def update(self, state, found, tokens):
        sizes_E = found[taps.DISPATCH].group_sizes_E
        expert_R = jnp.repeat(
            jnp.arange(sizes_E.size),
            sizes_E,
            total_repeat_length=found[taps.EXPERT_INPUT].shape[0],
        )
        rows_RxD = found[taps.EXPERT_INPUT] * found[taps.DISPATCH].valid_R[:, None]
        return state.at[expert_R].add(rows_RxD[:, :, None] * rows_RxD[:, None, :])

    def merge(self, a, b):
        return a + b

    def finalize(self, state):
        return np.asarray(state, np.float64)


def test_an_accumulator_from_outside_reads_other_taps(tokens, monkeypatch):
    """Catches a collector that knows its accumulators, and one that asks layers for every tap."""
    requests = []
    real = stream.run_block

    def watched(*args):
        requests.append(args[4])
        return real(*args)

    monkeypatch.setattr(stream, "run_block", watched)
    model = make_model(5, make_spec(dense(), routed(4)))
    batches = cut({"docs": tokens[:40]}, 3)
    found = collect(model, batches, (InputMoments(), ExpertCounts()))
    assert requests == [frozenset(), frozenset({*InputMoments.request, taps.ROUTING})]
    assert found.layers[0] == {}
    moments, counts = found.of(1, InputMoments()), found.of(1, ExpertCounts())
    for e in range(4):
        total = np.zeros((32, 32))
        for batch in batches:
            output = forward(model, batch, frozenset({taps.FFN_INPUT, taps.ROUTING}))
            routing, x = output.routings[1], np.asarray(output.taps[1][taps.FFN_INPUT], float)
            chosen = np.asarray(routing.valid_A) & (np.asarray(routing.expert_A) == e)
            rows = x[np.asarray(routing.token_A)[chosen]]
            total += rows.T @ rows
        np.testing.assert_allclose(moments[e], total, rtol=1e-4, atol=1e-4)
    assert counts.sum() == 2 * 40


def test_the_fingerprint_is_of_all_that_decides(model, tokens, found):
    """Catches a cache key blind to a weight, a token, the mask or an accumulator."""

    def fingerprint(model=model, tokens=tokens, accumulators=ALL):
        return collect(model, cut({"docs": tokens}, 3), accumulators).fingerprint

    assert fingerprint() == found.fingerprint
    nudged = make_model(0)
    assert fingerprint(nudged) == found.fingerprint
    embed = compat.read(nudged.embed)
    compat.write(nudged.embed, embed.at[5, 7].set(jnp.nextafter(embed[5, 7], 1.0)))
    changed = tokens.copy()
    changed[11] = (changed[11] + 1) % 64
    others = [
        fingerprint(nudged),
        fingerprint(tokens=changed),
        fingerprint(tokens=tokens[:-1]),
        fingerprint(accumulators=ALL[:2]),
    ]
    assert len({found.fingerprint, *others}) == 5


def test_text_that_does_not_fit_is_refused(model, tokens):
    """Catches statistics of nothing, ids that a gather clips, and NaN in a table."""
    with pytest.raises(DataError, match="no text"):
        collect(model, [], ALL)
    with pytest.raises(DataError, match="vocabulary has 64"):
        collect(model, cut({"docs": tokens + 40}, 3), ALL)
    broken = make_model(0)
    compat.write(broken.embed, compat.read(broken.embed).at[:].set(jnp.nan))
    with pytest.raises(MoejaxError, match="of layer 0 is not finite"):
        collect(broken, cut({"docs": tokens}, 3), ALL)


def test_statistics_join_and_part(model, tokens, found):
    """Catches a join across texts, and a missing statistic that reads as zero."""
    counts = found.only(["expert_counts"])
    with pytest.raises(MoejaxError, match=r"layer 1 has no statistic 'gate_mass'"):
        counts.of(1, GateMass())
    joined = counts.joined(found.only(["gate_mass"]))
    assert set(joined.layers[0]) == {"expert_counts", "gate_mass"}
    with pytest.raises(MoejaxError, match="same text"):
        found.joined(collect(model, cut({"docs": tokens[:-1]}, 3), ALL))
