"""Experts on different grids: their order, their books, and what stays the same."""

import numpy as np
import pytest

from moejax import weights
from moejax.compress import GPTQ, FullPrecision, MixedPrecision, Quantize, payload
from moejax.core import SpecError, spec
from moejax.models import abstract_model, parameters
from moejax.weights import AsymmetricGrid, Buckets
from tests.compress.conftest import (
    EXPERTS,
    LAYERS,
    MATRICES,
    apply,
    assert_same_weights,
    logits,
)

TWO, FOUR = AsymmetricGrid(bits=2, group=16), AsymmetricGrid(bits=4, group=16)


@spec
class Fixed:
    """A given choice for every layer."""

    choice: tuple[int, ...]

    def needs(self, grids):
        return ()

    def outline(self, model, grids):
        return dict.fromkeys(model.moe_layers, self.choice)

    def decide(self, stats, model, grids):
        return dict.fromkeys(model.spec.moe_layers, self.choice)


MIXED = MixedPrecision(grids=(FOUR, TWO), allocation=Fixed(choice=(1, 0, 1, 0, 0, 1)))


def uniform(grid, **how):
    return MixedPrecision(grids=(grid,), allocation=Fixed(choice=(0,) * EXPERTS), **how)


def test_every_expert_gets_the_grid_chosen_for_it(applied, model):
    """Catches banks in the new order under router rows in the old one."""
    after, ledger = applied(MIXED)
    (four, _), (two, _) = applied(Quantize(grid=FOUR)), applied(Quantize(grid=TWO))
    for layer in range(LAYERS):
        name = f"layers.{layer}.moe.experts.up"
        bank = parameters(after)[name]
        assert isinstance(bank, Buckets) and bank.sizes == (3, 3)
        order = [1, 3, 4, 0, 2, 5]
        for place, expert in enumerate(order):
            wanted = parameters(four if place < 3 else two)[name]
            np.testing.assert_array_equal(
                weights.materialize(bank)[place], weights.materialize(wanted)[expert]
            )
        kernel = f"layers.{layer}.moe.router.scores.kernel"
        before = np.asarray(parameters(model)[kernel])
        np.testing.assert_array_equal(parameters(after)[kernel], before[:, order])
    bits = {row.expert: row.code_bits for row in ledger}
    assert [bits[e] for e in range(EXPERTS)] == [2, 4, 2, 4, 4, 2]
    assert len(ledger) == LAYERS * EXPERTS * MATRICES


def test_one_grid_is_quantize(applied):
    """Catches a mixed path that rounds in another way than the uniform one."""
    for how in ({}, {"method": GPTQ(least_tokens=0.0)}):
        mixed, rows = applied(uniform(TWO, **how))
        plain, wanted = applied(Quantize(grid=TWO, **how))
        assert_same_weights(mixed, plain)
        assert [r.relative_error for r in rows] == [r.relative_error for r in wanted]


def test_full_precision_for_all_is_the_identity(applied, model, text):
    """Catches a full budget that still costs something."""
    after, _ = applied(uniform(FullPrecision()))
    np.testing.assert_array_equal(logits(after, text), logits(model, text))


def test_full_precision_beside_a_grid_is_bfloat16(applied):
    """Catches float32 experts in the books of a bfloat16 model."""
    step = MixedPrecision(grids=(FullPrecision(), TWO), allocation=Fixed(choice=(0, 0, 1, 1, 1, 1)))
    after, ledger = applied(step)
    bank = parameters(after)["layers.0.moe.experts.up"]
    assert bank.parts[0].dtype == "bfloat16"
    assert {r.code_bits for r in ledger if r.expert < 2} == {16}
    assert {r.stored_bytes for r in ledger if r.expert < 2} == {32 * 32 * 2}


def test_the_outline_is_what_comes_of_it(applied, model):
    """Catches plans with other bytes than runs."""
    outlined, names = MIXED.outline(abstract_model(model.spec))
    after, _ = applied(MIXED)
    assert payload(outlined) == payload(after)
    assert len(names) == LAYERS * MATRICES


def test_what_cannot_be_mixed_is_refused(model, source):
    """Catches experts quantized twice, and one grid named twice."""
    with pytest.raises(SpecError, match="already stored as Packed"):
        apply(model, [Quantize(grid=FOUR), MIXED], source)
    with pytest.raises(SpecError, match="grids"):
        MixedPrecision(grids=(TWO, TWO), allocation=Fixed(choice=(0,) * EXPERTS))
