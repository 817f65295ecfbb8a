"""w = u v + S before training, and the channels left of S after it."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import load_model, save_model
from moejax.compress import (
    Factorise,
    Frequency,
    HierarchicalClusters,
    LowRankAndRest,
    MergeExperts,
    ProportionalRanks,
    StoreChannels,
    UniformRank,
    account,
    check_recipe,
)
from moejax.core import SpecError
from moejax.models import parameters, with_parameters
from moejax.weights import LowRank, Sum, Transposed, materialize
from tests.compress.conftest import EXPERTS, LAYERS, apply, assert_same_weights, logits

RANK, WIDTH = 4, 32
MERGE = MergeExperts(grouping=HierarchicalClusters(groups=3))
APART = Factorise(ranks=UniformRank(rank=RANK), method=LowRankAndRest())
UP = "layers.0.moe.experts.up"


def pruned(model, left):
    """The model with all but the first `left` output channels of every S set to zero."""
    named = parameters(model)
    for name, w in named.items():
        if isinstance(w, Sum):
            pair, rest = w.terms
            named[name] = Sum((pair, rest.at[..., left:].set(0)))
    return with_parameters(model.spec, named)


def test_taking_apart_changes_nothing(model, text, applied):
    """Catches an S that is not what the stored factors leave over; behind a slot map too."""
    for recipe in ((), (MERGE,)):
        whole = applied(*recipe)[0] if recipe else model
        after, ledger = applied(*recipe, APART)
        np.testing.assert_allclose(logits(after, text), logits(whole, text), atol=2e-5)
        pair, rest = parameters(after)[UP].terms
        assert pair.u.shape[-1] == RANK and rest.dtype == pair.u.dtype == jnp.float32
        errors = [r.relative_error for r in ledger if r.pass_name == "Factorise"]
        assert max(errors) < 1e-5


def test_only_channels_that_are_left_are_stored(text, applied, source):
    """Catches inputs in the place of outputs, S stored without the factors' part of a channel, and
    zeros that are stored: bytes are those of factors, 8 channels and their index."""
    trained = pruned(applied(APART)[0], 8)
    after, ledger = apply(trained, [StoreChannels(left=0.25)], source)
    w = parameters(after)[UP]
    assert isinstance(w, Transposed)
    for name in (UP, "layers.1.moe.experts.down"):
        exact, near = (np.asarray(materialize(parameters(m)[name])) for m in (trained, after))
        np.testing.assert_allclose(near, exact, atol=0.01 * np.abs(exact).max())
    assert max(row.relative_error for row in ledger) < 0.01
    matrix = 2 * RANK * (WIDTH + WIDTH) + 8 * WIDTH * 2 + 8 * 2
    assert account(after).expert_bytes == LAYERS * EXPERTS * 3 * matrix
    assert sum(row.stored_bytes for row in ledger) == LAYERS * EXPERTS * 3 * matrix
    np.testing.assert_allclose(logits(after, text), logits(trained, text), atol=0.15)


def test_channels_of_least_size_go(applied, source):
    """Catches channels in the order in which they are stored: here the last ones are largest."""
    named = parameters(applied(APART)[0])
    pair, rest = named[UP].terms
    grown = Sum((pair, rest * jnp.where(jnp.arange(WIDTH) >= 24, 8.0, 0.1)))
    model = with_parameters(applied(APART)[0].spec, {**named, UP: grown})
    after, _ = apply(model, [StoreChannels(left=0.25)], source)
    np.testing.assert_array_equal(np.unique(parameters(after)[UP].of.index), np.arange(24, WIDTH))


def test_factors_alone(applied, source):
    """Catches an empty table: with no channel left a matrix is its factors."""
    after, _ = apply(pruned(applied(APART)[0], 0), [StoreChannels(left=0.0)], source)
    assert isinstance(parameters(after)[UP], LowRank)
    assert account(after).code_bits == 16 * RANK * 2 * WIDTH / WIDTH**2


def test_what_is_stored_saves_and_loads(applied, source, tmp_path):
    """Catches a format that a manifest cannot name, alone and under a slot map."""
    after, _ = apply(applied(MERGE, APART)[0], [StoreChannels(left=0.5)], source)
    save_model(tmp_path / "model", after, dtype=jnp.float32)
    assert_same_weights(after, load_model(tmp_path / "model"))


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        ([StoreChannels(left=0.5)], r"layers.0.moe.experts.\w+ is no sum .*\n.*LowRankAndRest"),
        ([APART, StoreChannels(left=0.5, parameters="embed")], "step 2 .*names embed"),
        ([APART, APART], "step 2 .*already stored as Sum"),
        (
            [Factorise(ranks=UniformRank(rank=WIDTH + 1), method=LowRankAndRest())],
            r"rank = 33 .*layers.0.moe.experts",
        ),
        (
            [
                MERGE,
                Factorise(
                    ranks=ProportionalRanks(mean_rank=4, score=Frequency()),
                    method=LowRankAndRest(),
                ),
            ],
            r"step 2 .*layers.0.moe.experts.\w+ holds 3 stored .* 6 .*\n.*UniformRank",
        ),
    ],
)
def test_what_cannot_be_is_said_before_any_work(model, recipe, wrong):
    """Catches a format that is looked at when its layer comes, and ranks of reordered slots."""
    with pytest.raises(SpecError, match=wrong):
        check_recipe(recipe, model)
    with pytest.raises(SpecError, match=r"left = 1.5"):
        StoreChannels(left=1.5)
