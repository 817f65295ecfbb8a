"""Globs over names."""

import pytest

from moejax.compress.patterns import OUTSIDE, in_layer, matching, parameter_shapes
from tests.evaluate.conftest import dense, make_spec, routed

SPEC = make_spec(dense(), routed(4), tie_embeddings=False)


@pytest.mark.parametrize(
    ("glob", "wanted"),
    [
        ("embed", ["embed"]),
        ("head", ["head"]),
        ("layers.1.moe.experts.*", [f"layers.1.moe.experts.{m}" for m in ("down", "gate", "up")]),
        ("layers.*.moe.router.*", ["layers.1.moe.router.scores.kernel"]),
        ("*.ffn.*", [f"layers.0.ffn.{m}" for m in ("down", "gate", "up")]),
        ("layers.[01].attention.[qk]", [f"layers.{i}.attention.{m}" for i in (0, 1) for m in "kq"]),
    ],
)
def test_a_glob_names_what_it_spells(glob, wanted):
    """Catches `ffn` that takes `ffn_norm` along, and case or order that depends on the platform."""
    assert sorted(matching("Pass.parameters", glob, SPEC)) == wanted


def test_shapes_are_those_of_single_layers():
    """Catches shapes of stacked runs, which lead with the layer axis."""
    shapes = parameter_shapes(SPEC)
    assert shapes["layers.1.moe.experts.up"] == (4, 32, 32)
    assert shapes["final_norm.scale"] == (32,)


def test_names_split_into_layer_and_rest():
    """Catches layer 1 for layer 12."""
    assert in_layer("layers.12.moe.experts.up") == (12, "moe.experts.up")
    assert in_layer("head") == (OUTSIDE, "head")
