"""Recovery as a step of a recipe: what trains, what stays, who teaches, what is refused."""

import numpy as np
import pytest

from moejax.compress import (
    AddAdapters,
    ExpertDrop,
    Factorise,
    Frequency,
    HierarchicalClusters,
    LowRankAndRest,
    MergeExperts,
    Quantize,
    StoreChannels,
    UniformRank,
    check_recipe,
)
from moejax.core import DataError, SpecError
from moejax.data import shipped_tokenizer
from moejax.jobs.recover import Recover, Rows, StraightThrough
from moejax.jobs.text import Text
from moejax.models import parameters
from moejax.train import (
    AdamW,
    Adapters,
    FromExperts,
    FromHidden,
    FromLogits,
    Matching,
    Norms,
    OnPolicy,
    PrunesChannels,
    RouterOnly,
)
from moejax.weights import SymmetricGrid
from tests.compress.conftest import Source, apply, leaves
from tests.evaluate.conftest import cut, make_model, make_spec, make_tokens, routed

TEXT = Text(bytes_per_group=4096, window=16)
FAST = AdamW(peak_learning_rate=1e-2, warmup=0, weight_decay=0.0)
GRID = SymmetricGrid(bits=4, group=None)


def recover(**how):
    return Recover(**{"text": TEXT, "steps": 2, "batch": 4, "optimizer": FAST, **how})


@pytest.fixture(scope="module")
def model():
    return make_model(0, make_spec(routed(), vocab=shipped_tokenizer().vocab))


@pytest.fixture(scope="module")
def source():
    return Source(cut({"docs": make_tokens(75)}, 5))


def changed(before, after):
    """The leaves that differ, under the same names."""
    old, new = leaves(before), leaves(after)
    assert old.keys() == new.keys()
    return {name for name in old if not np.array_equal(old[name], new[name])}


def test_router_only_leaves_all_else_bit_equal(model, source):
    """Catches weight decay, router state or norms that move with the router, and a model that is
    changed in place by a step that donates it."""
    before = {n: a.copy() for n, a in leaves(model).items()}
    after, ledger = apply(model, [recover(trains=RouterOnly())], source)
    assert changed(model, after) == {"layers.0.moe.router.scores.kernel"}
    assert all(np.array_equal(a, before[n]) for n, a in leaves(model).items())
    assert len(ledger) == 0


def test_adapters_train_beside_frozen_codes(model, source):
    """Catches codes or scales that move, and an adapter that is no part of the forward pass."""
    recipe = [Quantize(grid=GRID), AddAdapters(rank=2)]
    begun, _ = apply(model, recipe, source)
    after, _ = apply(model, [*recipe, recover(trains=Adapters(), steps=3)], source)
    moved = changed(begun, after)
    experts = {f"layers.0.moe.experts.{m}" for m in ("gate", "up", "down")}
    assert {name.split(".terms")[0] for name in moved} == experts
    assert all(".terms[1]." in name for name in moved) and len(moved) == 6
    outlined, names = recover(trains=Adapters()).outline(begun)
    assert parameters(outlined).keys() == parameters(begun).keys() and len(names) == 6


def test_adapters_change_nothing_before_they_are_trained(model, source):
    """Catches both factors drawn at random."""
    from tests.compress.conftest import logits

    text = cut({"docs": make_tokens(75)}, 5)
    begun, _ = apply(model, [AddAdapters(rank=3)], source)
    np.testing.assert_allclose(logits(begun, text), logits(model, text), atol=1e-5)


def test_training_through_a_grid_ends_on_it(model, source):
    """Catches floats left behind, codes of the weights before training, and a frozen grid."""
    through = StraightThrough(grid=GRID)
    begun, _ = apply(model, [Quantize(grid=GRID)], source)
    wide = AdamW(peak_learning_rate=0.2, warmup=0, weight_decay=0.0)  # a level is 0.1 wide
    step = recover(through=through, optimizer=wide, trains=Matching(globs=("*.experts.*",)))
    after, _ = apply(model, [Quantize(grid=GRID), step], source)
    outlined, _ = recover(through=through).outline(begun)
    shapes = {n: (a.shape, a.dtype) for n, a in leaves(begun).items()}
    assert {n: (a.shape, a.dtype) for n, a in leaves(after).items()} == shapes
    assert type(parameters(outlined)["layers.0.moe.experts.up"]).__name__ == "Packed"
    assert any(".experts." in name and "words" in name for name in changed(begun, after))


def test_channels_that_training_left_are_all_that_is_stored(model, source):
    """Catches channels that grow back after the last step, a schedule that ends with more than are
    stored, and factors that do not train: merged experts of the whole second half of MC-SMoE."""
    low = Factorise(ranks=UniformRank(rank=4), method=LowRankAndRest())
    recipe = [MergeExperts(grouping=HierarchicalClusters(groups=3)), low]
    begun, _ = apply(model, recipe, source)
    prunes = PrunesChannels(left=0.25, warmup=1, settled=1, optimizer=FAST)
    last = [recover(optimizer=prunes, steps=4), StoreChannels(left=0.25)]
    after, ledger = apply(model, [*recipe, *last], source)
    rows = [row for row in ledger if row.pass_name == "StoreChannels"]
    assert len(rows) == 3 * 3 and max(row.relative_error for row in rows) < 0.005  # bfloat16
    assert parameters(after)["layers.0.moe.experts.up"].of.index.shape == (3, 8)
    old = parameters(begun)["layers.0.moe.experts.up"].terms[0].u
    new = parameters(after)["layers.0.moe.experts.up"].of.base.v  # of the transpose
    assert np.abs(np.swapaxes(old, -1, -2) - np.asarray(new, np.float32)).max() > 0.01


def test_merged_experts_are_taught_by_the_model_they_came_from(model, source):
    """Catches the merged model as its own teacher, whose loss is zero at the start."""
    recipe = [MergeExperts(grouping=HierarchicalClusters(groups=3))]
    losses = FromHidden(), FromExperts(), FromLogits(temperature=2.0)
    for objective in losses[:2]:
        check_recipe([*recipe, recover(objective=objective)], model)
    own = OnPolicy(share=0.5, prompt=8)
    step = recover(objective=losses[2], on_policy=own, trains=Matching(globs=("*.experts.*",)))
    begun, _ = apply(model, recipe, source)
    after, _ = apply(model, [*recipe, step], source)
    moved = changed(begun, after)
    assert moved == {f"layers.0.moe.experts.{m}" for m in ("gate", "up", "down")}


def test_statistics_are_collected_anew_behind_a_recovery(model):
    """Catches a pass that decides on the model before it was trained."""
    source = Source(cut({"docs": make_tokens(75)}, 5))
    drop = ExpertDrop(fraction=1 / 6, score=Frequency())
    apply(model, [drop, recover(trains=Norms(), steps=1), drop], source)
    assert len(source.asked) == 2


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        ([recover(trains=Adapters())], r"trains = Adapters\(\) finds nothing"),
        ([recover(trains=Matching(globs=("*.nothing",)))], r"finds nothing to train"),
        (
            [ExpertDrop(fraction=0.5, score=Frequency()), recover(objective=FromExperts())],
            r"step 2 of the recipe, Recover: .*\n.*Router experts per layer are \(3,\) and \(6,\)",
        ),
        (
            [recover(optimizer=PrunesChannels(left=0.5, warmup=0, settled=1))],
            r"PrunesChannels: no leaf that trains ends in .*\n.*LowRankAndRest",
        ),
        ([AddAdapters(rank=64)], r"rank = 64 does not fit layers.0.moe.experts.down, 32 x 32"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(model, recipe, wrong):
    """Catches a recovery that fails, or trains nothing, after hours of earlier passes."""
    with pytest.raises(SpecError, match=wrong):
        check_recipe(recipe, model)


def test_rows_come_once_per_epoch_and_resume():
    """Catches rows that repeat within an epoch, half-filled rows, and a position that is lost."""
    rows = Rows(TEXT, shipped_tokenizer(), 8, seed=0)
    per_epoch = len(rows._rows) // 8
    first = [next(rows).tokens_BxS1 for _ in range(per_epoch)]
    assert first[0].shape == (8, 17)
    seen = {tuple(row) for batch in first for row in batch}
    assert (
        len(seen) == len(np.unique(np.concatenate(first), axis=0))
        and len(seen) > 0.9 * per_epoch * 8
    )
    state = rows.state()
    later = next(rows).tokens_BxS1
    rows.restore(state)
    np.testing.assert_array_equal(next(rows).tokens_BxS1, later)
    with pytest.raises(DataError, match="full windows of 16"):
        Rows(TEXT, shipped_tokenizer(), 10_000, seed=0)
