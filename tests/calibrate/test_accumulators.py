"""Every accumulator against a recount in NumPy, on taps made by hand."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import (
    AllTokens,
    AttentionMass,
    BlockCosine,
    ByGroup,
    CoActivation,
    ExpertCounts,
    FFNCosine,
    GateMass,
    GateRatios,
    GateWeighted,
    LayerInputs,
    MeanOutputs,
    NeuronNorms,
    OutputNorms,
    ProbabilityMass,
    SecondMoments,
    SoftCounts,
    StreamCosine,
    Tokens,
    group_id,
    quantile,
)
from moejax.core import DataError, SpecError, Taps, taps
from moejax.moe import Capacity, Dense, Dropless, Routing
from tests.evaluate.conftest import dense, make_spec, routed

E, K, D, F, B, S = 5, 2, 8, 32, 3, 8
T = B * S
LAYER = routed(E, K)
MODEL = make_spec(LAYER, width=D)
DEAD = 3  # an expert that nobody chooses


@dataclasses.dataclass
class Made:
    """A batch of taps, and the arrays they are made of."""

    found: Taps
    tokens: Tokens
    mask: np.ndarray
    chosen: np.ndarray  # [T, K]
    gate: np.ndarray
    probability: np.ndarray
    x: np.ndarray
    y: np.ndarray  # [E, T, D]
    hidden: np.ndarray  # [E, T, F]


@functools.partial(jax.jit, static_argnums=0)
def planned(dispatch, routing):
    return dispatch.plan(routing, routing.expert_A, E)


def made(seed, start=0, group="docs", dispatch=None, listed=False):
    """listed: as an assignment list of no particular shape."""
    draw = np.random.default_rng(seed)
    mask = draw.random(T) < 0.8
    alive = [e for e in range(E) if e != DEAD]
    chosen = np.stack([draw.permutation(alive)[:K] for _ in range(T)])
    logits = draw.standard_normal((T, E)).astype(np.float32)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gate = draw.random((T, K)).astype(np.float32)
    x, y, hidden = (draw.standard_normal(s, np.float32) for s in ((T, D), (E, T, D), (E, T, F)))
    routing = Routing(
        token_A=jnp.repeat(jnp.arange(T), K),
        expert_A=jnp.asarray(chosen.reshape(-1), jnp.int32),
        gate_A=jnp.asarray(gate.reshape(-1)),
        valid_A=jnp.repeat(jnp.asarray(mask), K),
        logits_TxE=jnp.asarray(logits),
        probabilities_TxE=jnp.asarray(probability),
        per_token=None if listed else K,
    )
    plan = planned(dispatch or Dropless(), routing)
    expert_R = np.repeat(np.arange(E), np.asarray(plan.group_sizes_E))
    expert_R = np.concatenate([expert_R, np.full(plan.token_R.size - expert_R.size, E - 1)])
    rows = (expert_R, np.asarray(plan.token_R))
    index = np.where(mask, start + np.cumsum(mask) - 1, -1).astype(np.int32)
    found = Taps(
        {
            taps.ROUTING: routing,
            taps.DISPATCH: plan,
            taps.FFN_INPUT: jnp.asarray(x),
            taps.FFN_OUTPUT: jnp.asarray(y[0]),
            taps.EXPERT_INPUT: plan.scatter(jnp.asarray(x)),
            taps.EXPERT_HIDDEN: jnp.asarray(hidden[rows]),
            taps.EXPERT_OUTPUT: jnp.asarray(y[rows]),
            taps.ALL_OUTPUT: jnp.asarray(y),
            taps.ALL_HIDDEN: jnp.asarray(hidden),
            taps.BLOCK_INPUT: jnp.asarray(x).reshape(B, S, D),
            taps.MIXER_OUTPUT: jnp.asarray(y[2]).reshape(B, S, D),
            taps.BLOCK_OUTPUT: jnp.asarray(y[1]).reshape(B, S, D),
            taps.ATTENTION_MASS: jnp.asarray(x[:, 0]).reshape(B, S),
        }
    )
    tokens = Tokens(jnp.asarray(mask), jnp.asarray(index), jnp.uint32(group_id(group)))
    return Made(found, tokens, mask, chosen, gate, probability, x, y, hidden)


FIRST = made(0)
BATCHES = (FIRST, made(1, start=int(FIRST.mask.sum())))


@functools.partial(jax.jit, static_argnums=0)
def updated(accumulator, state, found, tokens):
    return accumulator.update(state, found, tokens)


def after(accumulator, *batches):
    """The state after some batches."""
    state = accumulator.init(LAYER, MODEL)
    for batch in batches:
        state = updated(accumulator, state, batch.found, batch.tokens)
    return state


def found(accumulator, *batches):
    return accumulator.finalize(after(accumulator, *(batches or BATCHES)))


def assignments(*batches):
    """(batch, token, expert, gate) of every valid one."""
    for batch in batches or BATCHES:
        for t, k in itertools.product(np.flatnonzero(batch.mask), range(K)):
            yield batch, t, batch.chosen[t, k], float(batch.gate[t, k])


def outer_sums(width, value):
    total = np.zeros((E, width, width))
    for batch, t, e, gate in assignments():
        v, weight = value(batch, t, e, gate)
        total[e] += weight * np.outer(v, v).astype(np.float64)
    return total


def test_masses_are_gates_and_probabilities():
    """Catches gates for probabilities, all experts' for the chosen's, and padding that counts."""
    counts, mass, probability, soft = (np.zeros(E) for _ in range(4))
    for batch, t, e, gate in assignments():
        counts[e] += 1
        mass[e] += gate
        probability[e] += batch.probability[t, e]
    for batch in BATCHES:
        soft += batch.probability[batch.mask].sum(0)
    np.testing.assert_array_equal(found(ExpertCounts()), counts)
    np.testing.assert_allclose(found(GateMass()), mass, rtol=1e-5)
    np.testing.assert_allclose(found(ProbabilityMass()), probability, rtol=1e-5)
    np.testing.assert_allclose(found(SoftCounts()), soft, rtol=1e-5)


def test_co_activation_counts_pairs():
    """Catches a pair counted for one order only, and a diagonal that is not the counts."""
    pairs = np.zeros((E, E), int)
    for batch in BATCHES:
        for t in np.flatnonzero(batch.mask):
            for i, j in itertools.product(batch.chosen[t], repeat=2):
                pairs[i, j] += 1
    np.testing.assert_array_equal(found(CoActivation()), pairs)


@pytest.mark.parametrize("listed", [False, True])
def test_gate_ratios_have_the_quantiles_of_the_ratios(listed):
    """Catches the second assignment for the second largest, and padding in bin 0."""
    batch = made(2, listed=listed)
    gate = np.sort(batch.gate[batch.mask], axis=1)
    ratios = gate[:, -2] / gate[:, -1]
    histogram = found(GateRatios(), batch)
    assert histogram.sum() == batch.mask.sum() and histogram.dtype == np.int64
    for q in (0.1, 0.5, 0.9):
        low = np.quantile(ratios, q, method="inverted_cdf")
        assert abs(quantile(histogram, q) - low) <= 1 / 4096
    assert quantile(np.asarray([0, 4, 0, 4]), 0.5) == 0.5
    assert quantile(np.asarray([0, 4, 0, 4]), 0.25) == pytest.approx(0.375)
    with pytest.raises(DataError, match="does not exist"):
        quantile(np.zeros(4), 0.5)


@pytest.mark.parametrize("dispatch", [Dropless(), Dense(), Capacity(factor=5.0)])
def test_second_moments_are_those_of_each_experts_rows(dispatch):
    """Catches empty rows that count, gates not squared, and rows of another expert."""
    batches = made(0, dispatch=dispatch), made(1, dispatch=dispatch)
    for rows, power in ((None, 0), (GateWeighted(), 2)):
        options = {} if rows is None else {"rows": rows}
        x_moments = found(SecondMoments(tap="expert_input", **options), *batches)
        h_moments = found(SecondMoments(tap="expert_hidden", **options), *batches)
        expected = outer_sums(D, lambda b, t, e, g, p=power: (b.x[t], g**p))
        np.testing.assert_allclose(x_moments, expected, atol=1e-4)
        hidden = outer_sums(F, lambda b, t, e, g, p=power: (b.hidden[e, t], g**p))
        np.testing.assert_allclose(h_moments, hidden, atol=1e-4)
        assert x_moments.dtype == np.float32 and not x_moments[DEAD].any()


def test_second_moments_of_all_tokens():
    """Catches chosen rows alone, padding, and one expert's moments where E are asked for."""
    moments = found(SecondMoments(tap="expert_input", rows=AllTokens()))
    x = np.concatenate([b.x[b.mask] for b in BATCHES]).astype(np.float64)
    assert moments.shape == (E, D, D)
    np.testing.assert_allclose(moments[DEAD], x.T @ x, atol=1e-4)
    np.testing.assert_array_equal(moments[0], moments[DEAD])
    moments = found(SecondMoments(tap="expert_hidden", rows=AllTokens()))
    hidden = np.concatenate([b.hidden[:, b.mask] for b in BATCHES], 1).astype(np.float64)
    np.testing.assert_allclose(moments, np.einsum("etf,etg->efg", hidden, hidden), atol=1e-3)
    plain = found(SecondMoments(tap="block_input"))
    np.testing.assert_allclose(plain, (x.T @ x)[None], atol=1e-4)


def test_moments_say_nothing_where_a_layer_has_no_such_tap():
    """Catches zeros where there is nothing, and rows chosen of a tap that has none."""
    assert SecondMoments(tap="expert_input").init(dense(), MODEL) is None
    assert SecondMoments(tap="shared_hidden").init(LAYER, MODEL) is None
    assert SecondMoments(tap="ffn_hidden").init(LAYER, MODEL) is None
    assert SecondMoments(tap="ffn_hidden").init(dense(), MODEL)[0].shape == (1, 32, 32)
    assert SecondMoments(tap="attention_context").init(LAYER, MODEL)[0].shape == (1, 32, 32)
    with pytest.raises(SpecError, match="rows"):
        SecondMoments(tap="ffn_input", rows=AllTokens())
    with pytest.raises(SpecError, match="tap"):
        SecondMoments(tap="logits")
    names = {
        SecondMoments(tap=t, rows=r).name
        for t in ("expert_input", "expert_hidden")
        for r in (AllTokens(), GateWeighted())
    }
    assert len(names | {SecondMoments().name, SecondMoments(tap="ffn_input").name}) == 6


def test_outputs_of_experts():
    """Catches means over chosen tokens alone, and norms with the other's gates."""
    y = np.concatenate([b.y[:, b.mask] for b in BATCHES], axis=1)
    np.testing.assert_allclose(found(MeanOutputs()), y.mean(1), atol=1e-5)
    norms = np.zeros((2, E))
    for batch, t, e, gate in assignments():
        size = np.linalg.norm(batch.y[e, t])
        norms[:, e] += size, gate * size
    np.testing.assert_allclose(found(OutputNorms()), norms, rtol=1e-5)


def test_means_over_tokens():
    """Catches padding in a mean, a mean of batch means, and the cosine of other vectors."""

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    def expected(of):
        return np.concatenate([of(b)[b.mask] for b in BATCHES]).mean()

    assert found(BlockCosine()) == pytest.approx(expected(lambda b: cosine(b.x, b.y[1])), rel=1e-4)
    assert found(FFNCosine()) == pytest.approx(expected(lambda b: cosine(b.x, b.y[0])), rel=1e-4)
    assert found(AttentionMass()) == pytest.approx(expected(lambda b: b.x[:, 0]), rel=1e-4)


@pytest.mark.parametrize("size", [5, 30, 100])
def test_a_sample_of_inputs_depends_on_no_order(size):
    """Catches the first tokens for a sample, rows of other tokens, padding and duplicates."""
    sample = LayerInputs(tokens=size)
    x = np.concatenate([b.x[b.mask] for b in BATCHES])
    rows = found(sample)
    assert rows.shape == (min(size, len(x)), D)
    at = [int(np.flatnonzero((x == row).all(1))[0]) for row in rows]
    assert len(set(at)) == len(at)
    if size == 5:
        assert at != sorted(at) and max(at) >= 5
    np.testing.assert_array_equal(found(sample, *BATCHES[::-1]), rows)
    merged = sample.merge(after(sample, BATCHES[1]), after(sample, BATCHES[0]))
    np.testing.assert_array_equal(sample.finalize(merged), rows)
    np.testing.assert_array_equal(found(LayerInputs(tokens=size + 3))[: len(rows)], rows)


def test_groups_are_kept_apart():
    """Catches groups that leak into each other, and text of other groups that counts."""
    code = made(1, group="code")
    other = made(2, group="other")
    for of in (ExpertCounts(), SecondMoments(), BlockCosine()):
        by = ByGroup(of=of, groups=("code", "docs", "none"))
        parts = found(by, BATCHES[0], code, other)
        np.testing.assert_allclose(parts[0], found(of, code), rtol=1e-6)
        np.testing.assert_allclose(parts[1], found(of, BATCHES[0]), rtol=1e-6)
        assert not parts[2].any()
        joined = by.merge(after(by, BATCHES[0], other), after(by, code))
        np.testing.assert_allclose(by.finalize(joined), parts, rtol=1e-6)
    with pytest.raises(SpecError, match="fixed shape"):
        ByGroup(of=LayerInputs(tokens=4), groups=("code",))


EVERY = (
    ExpertCounts(),
    GateMass(),
    ProbabilityMass(),
    SoftCounts(),
    CoActivation(),
    GateRatios(),
    SecondMoments(),
    SecondMoments(tap="expert_hidden", rows=AllTokens()),
    MeanOutputs(),
    OutputNorms(),
    NeuronNorms(),
    BlockCosine(),
    StreamCosine(before="block_input", after="mixer_output"),
    AttentionMass(),
)


@pytest.mark.parametrize("accumulator", EVERY, ids=lambda a: a.name)
def test_streams_merge_and_nothing_is_not_nan(accumulator):
    """Catches a merge that forgets one side, and 0 / 0 where no token came."""
    parts = [after(accumulator, batch) for batch in BATCHES]
    merged = accumulator.finalize(accumulator.merge(*parts))
    np.testing.assert_allclose(merged, found(accumulator), rtol=1e-5, atol=1e-5)
    nothing = accumulator.finalize(accumulator.init(LAYER, MODEL))
    assert nothing.shape == merged.shape and not nothing.any()
