"""Specs: types, impossible values, JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import CheckpointError, SpecError, check_that, from_json, spec, to_json


@spec
class Leaf:
    bits: int
    scale: float = 1.0
    name: str | None = None

    def check(self):
        check_that(self.bits > 0, self, "bits", "Give at least one bit.")


@spec
class Tree:
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[int, str] = (0, "")
    either: Leaf | None = None
    flag: bool = False


def test_a_spec_is_hashable_and_equal_by_value():
    """Catches specs compared by identity, which would retrace every jit that is keyed by one."""
    assert Tree(leaves=(Leaf(bits=2),)) == Tree(leaves=(Leaf(bits=2),))
    assert len({Leaf(bits=2), Leaf(bits=2), Leaf(bits=3)}) == 2


def test_an_int_becomes_a_float_where_a_float_is_asked_for():
    """Catches specs that differ between scale=2 and scale=2.0, in value or in type."""
    assert type(Leaf(bits=1, scale=2).scale) is float


@pytest.mark.parametrize(
    ("build", "field", "value"),
    [
        (lambda: Leaf(bits="3"), "bits", "'3'"),
        (lambda: Leaf(bits=True), "bits", "True"),
        (lambda: Leaf(bits=2.0), "bits", "2.0"),
        (lambda: Leaf(bits=1, scale=True), "scale", "True"),
        (lambda: Leaf(bits=1, name=3), "name", "3"),
        (lambda: Tree(leaves=[]), "leaves", "[]"),
        (lambda: Tree(leaves=(Leaf(bits=1), 4)), "leaves[1]", "4"),
        (lambda: Tree(pair=(1, "a", "b")), "pair", "(1, 'a', 'b')"),
        (lambda: Tree(either=5), "either", "5"),
        (lambda: Tree(flag=1), "flag", "1"),
        (lambda: Tree(leaves=(Leaf,)), "leaves[0]", "Leaf"),
    ],
)
def test_a_wrong_type_names_field_and_value(build, field, value):
    """Catches duck-typed specs: a bool for an int, a list for a tuple, a class for an instance."""
    with pytest.raises(SpecError) as caught:
        build()
    assert field in caught.value.problem
    assert value in caught.value.problem
    assert caught.value.fix


def test_an_impossible_value_names_field_value_and_fix():
    """Catches a check() that is not run, or an error without the mend."""
    with pytest.raises(SpecError) as caught:
        Leaf(bits=0)
    assert caught.value.field == "bits"
    assert "Leaf.bits = 0" in str(caught.value)
    assert "Give at least one bit." in str(caught.value)


def test_positional_arguments_are_refused():
    """Catches specs whose meaning hangs on the order of fields."""
    with pytest.raises(TypeError):
        Leaf(3)  # type: ignore[misc]


LEAVES = st.builds(
    Leaf,
    bits=st.integers(1, 8),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    name=st.none() | st.text(max_size=8),
)
TREES = st.builds(
    Tree,
    leaves=st.lists(LEAVES, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.text(max_size=4)),
    either=st.none() | LEAVES,
    flag=st.booleans(),
)


@given(tree=TREES)
@settings(max_examples=40, deadline=None)
def test_json_round_trip(tree):
    """Catches a field lost in JSON, tuples that come back as lists, floats that lose digits."""
    assert from_json(json.loads(json.dumps(to_json(tree)))) == tree


def test_tuples_and_dicts_of_specs_travel_too():
    """Catches a to_json that only goes into specs."""
    value = {"a": (Leaf(bits=1), None), "b": 3}
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


def test_only_registered_types_are_built():
    """Catches a from_json that imports or builds whatever a file names."""
    with pytest.raises(CheckpointError, match=r"os\.system"):
        from_json({"type": "os.system", "command": "true"})


def test_an_unknown_field_is_refused():
    """Catches files of another version read with fields silently dropped."""
    with pytest.raises(CheckpointError, match="colour"):
        from_json({"type": "Leaf", "bits": 2, "colour": 1})


def test_an_impossible_value_in_a_file_is_refused():
    """Catches a from_json that goes around the checks."""
    with pytest.raises(SpecError):
        from_json({"type": "Leaf", "bits": -1})
    with pytest.raises(SpecError):
        from_json({"type": "Leaf", "bits": "2"})


def test_what_is_no_spec_is_refused():
    """Catches objects written by their repr, which no from_json could read."""
    with pytest.raises(TypeError):
        to_json(object())
    with pytest.raises(TypeError):
        to_json({"a": {1, 2}})


def test_two_specs_of_one_name_are_refused():
    """Catches a registry in which the module imported last decides what a file means."""
    with pytest.raises(TypeError, match="two specs are named Leaf"):
        spec(type("Leaf", (), {"__annotations__": {"bits": int}, "__module__": "elsewhere"}))


@pytest.mark.parametrize("data", [{"type": "Leaf"}, {"type": ["Leaf"]}, {"type": None}])
def test_a_damaged_spec_is_a_checkpoint_error(data):
    """Catches a TypeError out of a file that lost a field, or whose type is no name."""
    with pytest.raises(CheckpointError):
        from_json(data)
