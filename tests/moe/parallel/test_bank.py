"""How banks are cut, and which cuts are refused; no device is needed."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from moejax.core import SpecError, taps
from moejax.mesh import MeshSpec
from moejax.moe import (
    GatedExperts,
    Local,
    MoELayer,
    MoESpec,
    NestedSwiGLU,
    PaddedAllToAll,
    Parallel,
    RouterContext,
    RouterSpec,
    SoftmaxGates,
    TopK,
)
from moejax.moe.parallel.bank import cuts, device_order
from moejax.weights import Sum
from tests.moe.parallel.banks import bank
from tests.moe.parallel.contract import (
    D,
    E,
    F,
    bucket_bank,
    dense_bank,
    halves,
    holding,
    low_rank,
    mixed_bank,
    packed,
)


def abstract(mesh: MeshSpec) -> Parallel:
    shape = mesh.shape
    automatic = (AxisType.Auto,) * len(shape)
    return Parallel(
        AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=automatic), PaddedAllToAll()
    )


def test_devices_hold_their_part_of_every_bucket():
    """Catches experts numbered as if the bank were one array: rows would meet others' weights."""
    np.testing.assert_array_equal(device_order(bucket_bank(), 2), [0, 1, 4, 5, 2, 3, 6, 7])
    np.testing.assert_array_equal(device_order(dense_bank(), 4), np.arange(E))


def test_words_scales_and_factors_are_cut_with_their_experts():
    """Catches a leaf of a format that lies whole on every device."""
    found = cuts(mixed_bank(), abstract(MeshSpec(expert=4)))
    assert {cut[0] for cut in found} == {("expert",)} and len(found) > 10


@pytest.mark.parametrize(
    ("bank", "mesh", "axis", "says"),
    [
        (dense_bank, MeshSpec(expert=3), "expert", "does not divide the 8 experts"),
        (bucket_bank, MeshSpec(expert=8), "expert", "does not divide the 4 experts"),
        (dense_bank, MeshSpec(model=3), "model", "does not divide the 32"),
        (mixed_bank, MeshSpec(model=8), "model", "does not divide the 4"),
        (
            lambda: holding(packed(0, D, F), packed(0, D, F), _patched()),
            MeshSpec(model=2),
            "model",
            "RowPatch names by number",
        ),
        (
            lambda: GatedExperts(E, D, F, NestedSwiGLU(), 0.1, rngs=nnx.Rngs(0)),
            MeshSpec(model=2),
            "model",
            "2 blocks",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_the_bank_says_which_axis(bank, mesh, axis, says):
    """Catches cuts through a group of codes, a pair of gate blocks or a bucket."""
    with pytest.raises(SpecError, match=says) as error:
        cuts(bank(), abstract(mesh))
    assert error.value.field == axis


@pytest.mark.parametrize("name", ["sparse", "dictionary", "sum_with_sparse"])
@pytest.mark.parametrize("rows", [False, True])
def test_an_expert_that_is_whole_on_every_device_is_not_summed_over_them(name, rows):
    """Catches outputs that count once per part of the hidden width, and codewords decoded with the
    levels of half the channels: both look like a bank that fits."""
    experts = bank(name, rows)
    for mesh in (MeshSpec(model=2), MeshSpec(data=2, expert=2, model=2)):
        with pytest.raises(SpecError, match="cannot (be )?cut") as error:
            cuts(experts, abstract(mesh))
        assert error.value.field == "model"
    assert len(cuts(experts, abstract(MeshSpec(fsdp=2, expert=4)))) > 3


def _patched():
    gate = mixed_bank().gate.get_value()
    return type(gate)(packed(1, F, D), gate.index, jnp.zeros((E, 2, D), jnp.bfloat16))


def test_buckets_are_found_within_other_formats():
    """Catches a residual in buckets whose experts are numbered as if it were one array."""
    experts = bank("shared_base_of_buckets", False)
    np.testing.assert_array_equal(device_order(experts, 2), [0, 2, 1, 3])


def test_matrices_of_an_expert_stay_together():
    """Catches buckets in one matrix alone, whose experts would lie apart."""
    torn = holding(halves(packed(0, D, F), packed(1, D, F)), low_rank(0, D, F), packed(4, F, D))
    assert device_order(torn, 1).size == E
    with pytest.raises(SpecError, match="tear experts apart"):
        device_order(torn, 2)
    parts = (halves(packed(0, D, F), packed(1, D, F)), low_rank(0, D, F))
    with pytest.raises(SpecError, match="not Buckets in a Sum"):
        device_order(holding(Sum(parts), low_rank(1, D, F), packed(4, F, D)), 2)


def test_single_rows_are_not_told_on_a_mesh():
    """Catches taps that silently return the rows of one device, or none."""
    router = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates())
    layer = MoELayer(MoESpec(experts=E, width=F, router=router), D, 0.1, rngs=nnx.Rngs(0))
    parallel = Parallel(abstract(MeshSpec(expert=4)).mesh, Local())
    with pytest.raises(SpecError, match="expert_input"):
        layer(jnp.ones((4, D)), RouterContext(), frozenset({taps.EXPERT_INPUT}), parallel)
