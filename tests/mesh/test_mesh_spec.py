"""Meshes as specs, and the rules of what cuts what."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from moejax.core import SpecError
from moejax.core.axes import EMBED, EXPERT, EXPERT_HIDDEN, HEADS, HIDDEN
from moejax.mesh import AXES, MeshSpec, Rules, batch_axes, batch_sharding, bytes_per_device


def test_an_open_axis_takes_what_the_others_leave():
    """Catches -1 taken as a size, and one that is resolved from all devices."""
    mesh = MeshSpec(data=2, expert=-1, model=2, memory_gb=16).resolved(32)
    assert mesh == MeshSpec(data=2, expert=8, model=2, memory_gb=16)
    assert mesh.devices == 32
    assert MeshSpec(expert=-1).resolved(1) == MeshSpec()
    with pytest.raises(SpecError, match=r"MeshSpec\.expert"):
        MeshSpec(expert=-1).devices  # noqa: B018


@pytest.mark.parametrize(
    ("mesh", "devices", "axis"),
    [
        (MeshSpec(data=2, expert=4), 6, "expert"),
        (MeshSpec(data=4, model=-1), 6, "data"),
        (MeshSpec(fsdp=2, node=2, model=3), 8, "model"),
        (MeshSpec(expert=4), 8, "data"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_says_which_axis(mesh, devices, axis):
    """Catches a reshape error deep inside jax, and devices that idle without a word."""
    with pytest.raises(SpecError, match=axis) as error:
        mesh.resolved(devices)
    assert error.value.field == axis and str(devices) in error.value.problem


def test_two_open_axes_are_refused():
    """Catches the second -1 resolved to 1."""
    with pytest.raises(SpecError, match=r"MeshSpec\.data and MeshSpec\.expert are both -1"):
        MeshSpec(data=-1, expert=-1)


def test_the_jax_mesh_has_all_axes():
    """Catches axes of one device left out: a PartitionSpec that names them would fail."""
    mesh = MeshSpec(expert=-1).build(jax.devices()[:1])
    assert mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
    assert math.prod(mesh.shape.values()) == 1


SIZES = MeshSpec(data=2, fsdp=2, node=2, expert=4, model=2).shape


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 64, 32), (EXPERT, EMBED, EXPERT_HIDDEN), P(("node", "expert"), "fsdp", "model")),
        ((8, 3, 32), (EXPERT, EMBED, EXPERT_HIDDEN), P(("node", "expert"), None, "model")),
        ((64, 5), (EMBED, HEADS), P("fsdp", None)),
        ((7, 6), (HIDDEN, None), P(None, None)),
        ((), (), P()),
    ],
)
def test_leaves_are_cut_by_their_logical_axes(shape, axes, expected):
    """Catches a lenient axis that is cut unevenly, and the layer axis of stacked weights cut."""
    assert Rules().partition(shape, axes, SIZES) == expected


def test_an_axis_of_devices_serves_once_per_leaf():
    """Catches embed rules over the expert axes that cut a bank's model width by them too."""
    rules = Rules(embed=("fsdp", "node", "expert"))
    bank = rules.partition((8, 64, 32), (EXPERT, EMBED, EXPERT_HIDDEN), SIZES)
    assert bank == P(("node", "expert"), "fsdp", "model")
    # Even where the model width comes first.
    assert rules.partition((64, 8), (EMBED, EXPERT), SIZES) == P("fsdp", ("node", "expert"))
    assert rules.partition((64, 8), (EMBED, HEADS), SIZES) == P(("fsdp", "node", "expert"), "model")
    assert rules.partition((12, 8), (EMBED, None), SIZES) == P(("fsdp", "node"), None)
    with pytest.raises(SpecError, match="embed"):
        Rules(embed=("tensor",))


@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 4, 4), "node"), ((6, 4, 4), "expert"), ((8, 4, 3), "model")]
)
def test_a_bank_that_the_mesh_does_not_divide_says_which_axis(shape, axis):
    """Catches experts or their hidden units that silently lie whole on every device."""
    with pytest.raises(SpecError, match=rf"MeshSpec\.{axis} = \d+ does not divide"):
        Rules().partition(shape, (EXPERT, EMBED, EXPERT_HIDDEN), SIZES)


def test_a_batch_is_cut_over_as_many_axes_as_divide_it():
    """Catches rows cut over `model`, and a batch of any odd size that fails."""
    assert batch_axes(32, SIZES) == ("data", "fsdp", "node", "expert")
    assert batch_axes(12, SIZES) == ("data", "fsdp")
    assert batch_axes(3, SIZES) == ()
    mesh = AbstractMesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 5)
    assert batch_sharding(mesh, 12).spec == P(("data", "fsdp"))
    assert batch_sharding(mesh, 3).spec == P(None)


def test_bytes_follow_the_rules():
    """Catches bytes that count an axis which cuts nothing of the array."""
    mesh = MeshSpec(data=2, fsdp=2, node=2, expert=4, model=2)
    assert bytes_per_device((8, 64, 32), (EXPERT, EMBED, EXPERT_HIDDEN), 2, mesh) == 8 * 64 * 2
    assert bytes_per_device((8, 3, 32), (EXPERT, EMBED, EXPERT_HIDDEN), 2, mesh) == 8 * 3 * 32 // 8
    assert bytes_per_device((5,), (None,), 4, mesh) == 20
