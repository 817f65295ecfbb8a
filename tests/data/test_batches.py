"""Training batches: exact resume, fixed mixture, every sequence once per epoch."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import DataError
from moejax.data import Batches

ROOM = {"a": np.arange(1, 400), "b": np.arange(1000, 1250), "c": np.arange(2000, 2999)}


def test_rows_are_stretches_of_their_own_group(store_of):
    """Catches targets that are not the next token, and rows filed under another group."""
    store = store_of(ROOM)
    batches = Batches(store, batch=6, length=8)
    for _ in range(30):
        batch = next(batches)
        assert batch.tokens_BxS1.shape == (6, 9) and batch.tokens_BxS1.dtype == np.int32
        assert (np.diff(batch.tokens_BxS1, axis=1) == 1).all()
        np.testing.assert_array_equal(batch.inputs_BxS + 1, batch.targets_BxS)
        for row, group in zip(batch.tokens_BxS1, batch.group_B, strict=True):
            assert row[0] in ROOM[batches.groups[group]]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_visits_every_sequence_once(store_of, epoch):
    """Catches sampling with replacement, and an order that is the same in every epoch."""
    store = store_of({"a": np.arange(1, 402)})
    batches = Batches(store, batch=7, length=8)  # 49 sequences, 7 batches per epoch
    read = [np.concatenate([next(batches).tokens_BxS1[:, 0] for _ in range(7)]) for _ in range(3)]
    starts = np.sort(read[epoch])
    assert (np.diff(starts) == 8).all() and len(starts) == 49
    assert not (np.diff(read[epoch]) > 0).all()
    assert batches.epochs() == {"a": 3.0}
    assert len({tuple(order - order.min()) for order in read}) == 3


@given(before=st.integers(0, 25), after=st.integers(1, 25), seed=st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_resume_is_exact_at_any_step(store_of_session, before, after, seed):
    """Catches a position that forgets the epoch, a group's own position or the mixture's phase."""
    arguments = (store_of_session, 5, 16, {"a": 0.5, "b": 0.3, "c": 0.2}, seed)
    whole = Batches(*arguments)
    for _ in range(before):
        next(whole)
    position = json.loads(json.dumps(whole.state()))
    resumed = Batches(*arguments)
    resumed.restore(position)
    for _ in range(after):
        for one, other in zip(next(whole), next(resumed), strict=True):
            np.testing.assert_array_equal(one, other)


def test_order_does_not_depend_on_other_readers_or_past_reads(store_of):
    """Catches a random state that is global or shared: two iterators would disturb each other."""
    store = store_of(ROOM)
    alone = Batches(store, 4, 8, seed=3)
    expected = [next(alone).tokens_BxS1 for _ in range(12)]
    one, other = Batches(store, 4, 8, seed=3), Batches(store, 4, 8, seed=4)
    different = False
    for step in range(12):
        np.random.seed(step)
        different |= (next(other).tokens_BxS1 != expected[step]).any()
        np.testing.assert_array_equal(next(one).tokens_BxS1, expected[step])
    assert different


def test_order_is_that_of_every_release(store_of):
    """Catches an order from NumPy's distributions, which may change from release to release."""
    batch = next(Batches(store_of(ROOM), 4, 8, seed=1))
    assert batch.tokens_BxS1[:, 0].tolist() == GOLDEN_STARTS


def test_mixture_holds_in_every_batch_and_over_all(store_of):
    """Catches shares that are rounded once, so that 5 % of a batch never come, and random draws."""
    shares = {"a": 0.55, "b": 0.05, "c": 0.4}
    batches = Batches(store_of(ROOM), 8, 8, shares)
    counts = np.array([np.bincount(next(batches).group_B, minlength=3) for _ in range(300)])
    wanted = 8 * np.array(list(shares.values()))
    assert (np.abs(counts - wanted) < 1.001).all()
    assert (np.abs(counts.sum(0) - 300 * wanted) < 8).all()


def test_groups_without_a_share_are_not_read(store_of):
    """Catches rows of a group whose share is 0."""
    batches = Batches(store_of(ROOM), 4, 8, {"a": 0.0, "c": 1.0})
    assert batches.groups == ("c",)
    assert next(batches).tokens_BxS1.min() >= 2000


def test_less_than_a_batch_is_refused(store_of):
    """Catches a small group that is repeated within a batch, or an endless loop over nothing."""
    store = store_of({"a": np.arange(500), "tiny": np.arange(40)})
    Batches(store, 8, 8)
    with pytest.raises(DataError, match="'tiny' has 40 tokens"):
        Batches(store, 16, 8)
    with pytest.raises(DataError, match="'tiny'"):
        Batches(store, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": {"a": 0.7}}, "sums to 0.7"),
        ({"mixture": {"a": 1.5, "b": -0.5}}, "negative"),
        ({"mixture": {"d": 1.0}}, "names group 'd'"),
        ({"split": "valid"}, "holds split 'train'"),
        ({"length": 0}, "length = 0"),
    ],
)
def test_impossible_arguments_are_named(store_of, change, message):
    """Catches arguments that fail later, as an index error, or never."""
    arguments = {"batch": 4, "length": 8} | change
    with pytest.raises(DataError, match=message):
        Batches(store_of(ROOM), **arguments)


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 9}, {"mixture": {"a": 1.0}}])
def test_position_of_other_batches_is_refused(store_of, change):
    """Catches a resume that silently goes on with other data than the run was started with."""
    store = store_of(ROOM)
    position = Batches(store, 4, 8).state()
    with pytest.raises(DataError, match="position belongs to another"):
        Batches(store, **({"batch": 4, "length": 8} | change)).restore(position)


@pytest.fixture(scope="module")
def store_of_session(tmp_path_factory):
    """A store that all examples of a property test read."""
    from moejax.data import GroupFacts, TokenStore

    folder = tmp_path_factory.mktemp("store")
    for group, array in ROOM.items():
        array.astype(np.uint16).tofile(folder / f"{group}.bin")
    facts = {group: GroupFacts(len(array), 1, len(array)) for group, array in ROOM.items()}
    return TokenStore(folder, "train", facts, np.dtype(np.uint16), 1 << 16, 0, "room")


GOLDEN_STARTS = [1000, 73, 2728, 241]


@pytest.mark.parametrize("cuts", [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 2, 4], [5]]])
def test_processes_read_the_rows_of_one_batch(store_of_session, cuts):
    """Catches processes that read the same rows, and positions that drift apart."""
    arguments = (store_of_session, 6, 16, {"a": 0.5, "b": 0.3, "c": 0.2})
    whole, parts = Batches(*arguments), [Batches(*arguments, rows=rows) for rows in cuts]
    for _ in range(12):
        batch = next(whole)
        for rows, part in zip(cuts, parts, strict=True):
            read = next(part)
            np.testing.assert_array_equal(read.tokens_BxS1, batch.tokens_BxS1[rows])
            np.testing.assert_array_equal(read.group_B, batch.group_B[rows])
    assert all(part.state() == whole.state() for part in parts)
