"""Dense students: what each gathering takes over, what stays, and what cannot be made dense."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.calibrate import ExpertCounts, collect
from moejax.compress import (
    DrawnAnew,
    GatherExperts,
    MeanOfExperts,
    OneExpert,
    SingularVectors,
    SumOfExperts,
    TopUnits,
    account,
    check_recipe,
    touched,
)
from moejax.core import SpecError
from moejax.models import DenseSpec, abstract_model, layers, parameters, with_layers
from tests.compress.conftest import EXPERTS, FOUR_BITS, LAYERS, Source, apply, logits
from tests.evaluate.conftest import dense, make_model, make_spec, routed

UP = "layers.1.moe.experts.up"


@functools.cache
def equal_experts():
    """A model whose experts are all the first one, so that gates that sum to one change nothing."""
    model = make_model(0)
    blocks = layers(model)
    for block in blocks:
        block.moe.experts.take(np.zeros(EXPERTS, int))
    return with_layers(model, blocks)


@pytest.fixture(scope="module")
def gather(text):
    """(model, gathering) -> (the student, the ledger)."""
    return functools.cache(
        lambda model, how: apply(model, [GatherExperts(gathering=how)], Source(text))
    )


@pytest.mark.parametrize(
    "gathering",
    [MeanOfExperts(), OneExpert(), SingularVectors(rank=32, scale=1 / EXPERTS)],
    ids=lambda g: type(g).__name__,
)
def test_equal_experts_are_reproduced(text, gather, gathering):
    """Catches gate weights that are built in, a sum for a mean, and norms that are lost."""
    student, _ = gather(equal_experts(), gathering)
    assert all(isinstance(layer.ffn, DenseSpec) for layer in student.spec.layers)
    seen = text[0].mask_BxS  # padding is routed nowhere, and a dense layer knows no padding
    both = (logits(made, text)[seen] for made in (student, equal_experts()))
    np.testing.assert_allclose(*both, atol=2e-4)


def test_sums_and_means_are_of_every_matrix(model, gather):
    """Catches down projections that are averaged where up is summed."""
    summed, mean = (gather(model, how)[0] for how in (SumOfExperts(), MeanOfExperts()))
    for name in ("gate", "up", "down"):
        bank = np.asarray(parameters(model)[f"layers.1.moe.experts.{name}"], np.float64)
        student = parameters(summed)[f"layers.1.ffn.{name}"]
        np.testing.assert_allclose(student, bank.sum(0), atol=1e-5)
        np.testing.assert_allclose(
            parameters(mean)[f"layers.1.ffn.{name}"], bank.mean(0), atol=1e-6
        )


def test_top_units_are_the_largest_of_each_expert(model, gather):
    """Catches the smallest units, units of one expert only, and a row of down that is another's."""
    student, _ = gather(model, TopUnits())
    bank = {
        n: np.asarray(parameters(model)[f"layers.1.moe.experts.{n}"])
        for n in ("gate", "up", "down")
    }
    norm = sum(np.square(bank[n]).sum(1) for n in ("gate", "up")) + np.square(bank["down"]).sum(2)
    place = 0
    for expert, share in enumerate((6, 6, 5, 5, 5, 5)):
        units = np.sort(np.argsort(-norm[expert])[:share])
        kept = slice(place, place + share)
        np.testing.assert_array_equal(
            parameters(student)["layers.1.ffn.up"][:, kept], bank["up"][expert][:, units]
        )
        np.testing.assert_array_equal(
            parameters(student)["layers.1.ffn.down"][kept], bank["down"][expert][units]
        )
        place += share


def test_singular_vectors_are_summed_truncations(model, gather):
    """Catches a truncation of the sum, and singular values that are left out."""
    student, _ = gather(model, SingularVectors(rank=4))
    wanted = 0
    for w in np.asarray(parameters(model)[UP], np.float64):
        u, s, v = np.linalg.svd(w)
        wanted = wanted + (u[:, :4] * s[:4]) @ v[:4]
    np.testing.assert_allclose(parameters(student)["layers.1.ffn.up"], wanted, atol=1e-4)


def test_the_most_used_expert_is_taken(model, text, gather):
    """Catches the least used, and one expert for all layers."""
    counts = collect(model, text, (ExpertCounts(),))
    student, _ = gather(model, OneExpert())
    for layer in range(LAYERS):
        best = int(np.argmax(counts.of(layer, ExpertCounts())))
        bank = parameters(model)[f"layers.{layer}.moe.experts.down"]
        np.testing.assert_array_equal(parameters(student)[f"layers.{layer}.ffn.down"], bank[best])


def test_what_is_no_expert_is_copied_and_the_ledger_says_where_experts_went(model, gather):
    """Catches attention or norms drawn anew, layers drawn alike, bytes of experts that are gone."""
    student, ledger = gather(model, DrawnAnew())
    before, after = parameters(model), parameters(student)
    assert all(np.array_equal(after[n], before[n]) for n in after if ".ffn." not in n)
    assert not np.array_equal(after["layers.0.ffn.up"], after["layers.1.ffn.up"])
    rows = ledger.last("arm")
    gone = [row for row in rows.values() if row.expert is not None]
    assert len(gone) == LAYERS * EXPERTS * 3 and all(r.gone and not r.stored_bytes for r in gone)
    assert rows[0, None, "ffn.up"].stored_bytes == 2 * 32 * 32
    books = account(student, touched(ledger, "arm"))  # the experts it touched are no more
    assert (books.code_bits, books.expert_bytes) == (16, 0)
    outlined, _ = GatherExperts(gathering=DrawnAnew()).outline(abstract_model(model.spec))
    assert outlined.spec == student.spec


def test_shared_experts_stay_beside_the_gathered_ones(text, gather):
    """Catches shared experts that are dropped or averaged in."""
    layer = routed()
    layer = dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, shared_width=8))
    model = make_model(0, make_spec(layer))
    block = layers(model)[0]
    student, _ = gather(model, MeanOfExperts())
    made = layers(student)[0]
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    mean = [
        np.asarray(getattr(block.moe.experts, n).get_value()).mean(0)
        for n in ("gate", "up", "down")
    ]
    gate = x @ mean[0]
    routed_part = (gate / (1 + np.exp(-gate)) * (x @ mean[1])) @ mean[2]
    shared = np.asarray(block.moe.shared(x))
    np.testing.assert_allclose(made.ffn(x), routed_part + shared, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "changes", "wrong"),
    [
        (MeanOfExperts(), {"expert_bias": True}, "layer 0 has experts with biases"),
        (SingularVectors(rank=33), {}, r"cannot treat layer 0.*\n.*rank = 33 is above 32"),
        (TopUnits(), {"width": 4}, r"each of 6 experts, which are 4 wide"),
    ],
)
def test_what_no_dense_layer_stands_for_is_refused(how, changes, wrong):
    """Catches biases that are lost and ranks that are cut in silence."""
    layer = routed()
    layer = dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, **changes))
    model = abstract_model(make_spec(layer))
    with pytest.raises(SpecError, match=wrong):
        check_recipe([GatherExperts(gathering=how)], model)
    with pytest.raises(SpecError, match="no experts"):
        check_recipe([GatherExperts(gathering=how)], make_model(0, make_spec(dense())))


def test_experts_in_a_format_are_refused(model):
    """Catches codes that are averaged."""
    with pytest.raises(
        SpecError, match=r"step 2 .*GatherExperts: layers.0.moe.experts.down is already"
    ):
        check_recipe([FOUR_BITS, GatherExperts(gathering=MeanOfExperts())], model)
    assert jax.tree.leaves(nnx.split(model)[1])
