"""A common expert and residuals: exactness, what a barycentre gains, what the ledger counts."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.compress import (
    Barycentre,
    FirstExpert,
    FullPrecision,
    LowRankResidual,
    MergeExperts,
    PlainMean,
    RandomGroups,
    ShareBase,
    SparseResidual,
    Sparsify,
    account,
    check_recipe,
)
from moejax.core import SpecError
from moejax.models import abstract_model, layers, parameters, permute_hidden, with_layers
from moejax.weights import AsymmetricGrid, NOfM, PerMatrix, SharedBase, Sparse, materialize
from tests.compress.conftest import EXPERTS, FOUR_BITS, LAYERS, Source, apply, logits
from tests.evaluate.conftest import make_model

WHOLE = FullPrecision()


@pytest.fixture(scope="module")
def share(text):
    """(model, pass) -> (after, ledger)."""
    return functools.cache(lambda model, how: apply(model, [how], Source(text)))


@functools.cache
def near_copies(spread):
    """Experts that are one expert, shuffled, each with noise of its own."""
    draw, model = np.random.default_rng(0), make_model(0)
    blocks = layers(model)
    for i, block in enumerate(blocks):
        block.moe.experts.take(np.zeros(EXPERTS, int))
        for name in ("gate", "up", "down"):
            variable = getattr(block.moe.experts, name)
            w = np.array(variable.get_value())
            variable.set_value(
                jnp.asarray(w + spread * draw.normal(size=w.shape).astype(np.float32))
            )
        order = np.stack([draw.permutation(32) for _ in range(EXPERTS)])
        blocks[i] = permute_hidden(block, order)
    return with_layers(model, blocks)


def residual_energy(model):
    return sum(
        float(jnp.square(materialize(w.residual)).sum())
        for w in parameters(model).values()
        if isinstance(w, SharedBase)
    )


def lost(after, before):
    """The squared difference of all expert weights."""
    mine, theirs = parameters(after), parameters(before)
    experts = [name for name in mine if ".experts." in name]
    return sum(
        float(jnp.square(materialize(mine[n]) - materialize(theirs[n])).sum()) for n in experts
    )


def test_whole_residuals_change_nothing(model, text, share):
    """Catches a base rounded after the residual was taken, and one order per matrix."""
    after, ledger = share(model, ShareBase(residual=WHOLE))
    np.testing.assert_allclose(logits(after, text), logits(model, text), atol=2e-5)
    assert max(row.relative_error for row in ledger) < 1e-6


def test_shuffled_copies_have_no_residuals(text, share):
    """Catches a plain mean in the place of the transport."""
    planted = near_copies(0.0)
    after, _ = share(planted, ShareBase(residual=WHOLE))
    size = sum(float(jnp.square(w).sum()) for n, w in parameters(planted).items() if "experts" in n)
    assert residual_energy(after) < 1e-4 * size  # the base is bfloat16
    low, _ = share(planted, ShareBase(residual=LowRankResidual(rank=1)))
    mean, _ = share(planted, ShareBase(residual=LowRankResidual(rank=1), centre=PlainMean()))
    exact = logits(planted, text)
    assert np.abs(logits(low, text) - exact).max() < 0.1 * np.abs(logits(mean, text) - exact).max()


def test_a_barycentre_leaves_less_than_the_mean_or_an_expert(share):
    """Catches a centre that is not transported to, or is not the mean of what comes to it."""
    planted = near_copies(0.1)
    left = {
        type(centre).__name__: residual_energy(
            share(planted, ShareBase(residual=WHOLE, centre=centre))[0]
        )
        for centre in (Barycentre(), PlainMean(), FirstExpert())
    }
    assert left["Barycentre"] < left["FirstExpert"] < left["PlainMean"]


def test_residuals_on_a_grid_lose_less_than_weights_on_it(share):
    """Catches codes of the weights in the place of the residuals'."""
    planted, grid = near_copies(0.05), AsymmetricGrid(bits=2, group=None)
    after, _ = share(planted, ShareBase(residual=grid))
    for w in parameters(after).values():
        if isinstance(w, SharedBase):
            alone = materialize(grid(materialize(w)))
            own = np.abs(materialize(w.residual)).max()
            assert own < 0.5 * np.abs(alone).max()


def test_a_quarter_of_the_residual_stays_by_size(model, share):
    """Catches the pattern of the weights instead of the residuals, and signs that count as size."""
    whole, _ = share(model, ShareBase(residual=WHOLE))
    after, ledger = share(model, ShareBase(residual=SparseResidual()))
    for name, w in parameters(after).items():
        if isinstance(w, SharedBase):
            assert isinstance(w.residual, Sparse)
            exact = np.asarray(materialize(parameters(whole)[name].residual))
            near = np.asarray(materialize(w.residual))
            least = np.sort(np.abs(exact).reshape(EXPERTS, -1), axis=1)[:, -256, None, None]
            kept = np.abs(exact) >= least
            np.testing.assert_array_equal(near != 0, kept)  # 256 of 32 x 32
            np.testing.assert_allclose(near[kept], exact[kept], rtol=0.01)
    base, mask, values = 2 * 32 * 32, 32 * 32 // 8, 2 * 256
    assert account(after).expert_bytes == LAYERS * 3 * (base + EXPERTS * (mask + values))
    assert sum(row.stored_bytes for row in ledger) == account(after).expert_bytes


def test_sparse_residuals_lose_less_than_sparse_weights(share):
    """Catches zeros in the sum instead of in the residual: at equal bytes, on near copies."""
    planted = near_copies(0.1)
    after, _ = share(planted, ShareBase(residual=SparseResidual()))
    # The base is 16 / 6 bits of each of six experts: so many weights more in the direct way.
    direct, _ = share(planted, Sparsify(pattern=PerMatrix(sparsity=0.75 - 1 / EXPERTS)))
    assert abs(account(after).expert_bytes / account(direct).expert_bytes - 1) < 0.01

    ordered = share(planted, ShareBase(residual=WHOLE))[0]  # hidden units as in `after`
    assert lost(after, ordered) < 0.5 * lost(direct, planted)  # measured 0.27


def test_no_zeros_lose_nothing_but_rounding(model, text, share):
    """Catches a residual of another order of hidden units than the base."""
    none = SparseResidual(pattern=PerMatrix(sparsity=0.0))
    after, _ = share(model, ShareBase(residual=none))
    whole, _ = share(model, ShareBase(residual=WHOLE))
    for name, w in parameters(after).items():
        if isinstance(w, SharedBase):
            exact = np.asarray(materialize(parameters(whole)[name]))
            np.testing.assert_allclose(materialize(w), exact, atol=0.01 * np.abs(exact).max())


def test_the_ledger_counts_the_base_once(model, share):
    """Catches a base that every expert pays for, and one that nobody pays for."""
    after, ledger = share(model, ShareBase(residual=LowRankResidual(rank=4)))
    assert sum(row.stored_bytes for row in ledger) == account(after).expert_bytes
    assert account(after).expert_bytes == LAYERS * 3 * 2 * (32 * 32 + EXPERTS * 4 * 64)
    outlined, names = ShareBase(residual=LowRankResidual(rank=4)).outline(
        abstract_model(model.spec)
    )
    assert account(outlined) == dataclasses.replace(account(after)) and len(names) == LAYERS * 3


def test_residuals_stand_behind_merged_experts(model, text):
    """Catches a base of router experts where fewer are stored."""
    recipe = [MergeExperts(grouping=RandomGroups(groups=3)), ShareBase(residual=WHOLE)]
    merged, _ = apply(model, recipe[:1], Source(text))
    both, _ = apply(model, recipe, Source(text))
    np.testing.assert_allclose(logits(both, text), logits(merged, text), atol=2e-5)


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        (
            [ShareBase(residual=LowRankResidual(rank=33))],
            r"rank = 33.*layers.0.moe.experts.gate, 32",
        ),
        (
            [ShareBase(residual=SparseResidual(pattern=NOfM(n=2, m=5)))],
            r"groups of 5 do not divide the 32 inputs of layers.0.moe.experts.gate",
        ),
        (
            [FOUR_BITS, ShareBase(residual=WHOLE)],
            r"step 2 .*ShareBase: layers.0.moe.experts.down.*Packed",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, recipe, wrong):
    """Catches a rank that is cut in silence, and residuals of codes."""
    with pytest.raises(SpecError, match=wrong):
        check_recipe(recipe, model)
