"""Models saved by earlier versions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import load_model, load_spec, save_model
from moejax.checkpoint.migrate import VERSION, migrated
from moejax.core import CheckpointError, from_json
from moejax.files import find_resource
from moejax.models import ModelSpec, ProjectionNorm, RMSNorm, Rope, parameters


def version_1(**attention):
    mixer = {"type": "AttentionSpec", "heads": 2, "kv_heads": 1, "head_width": 4, **attention}
    layers = [{"type": "LayerSpec", "mixer": m, "ffn": None} for m in (mixer, None)]
    spec = {"type": "ModelSpec", "vocab": 8, "width": 8, "layers": layers}
    return {"version": 1, "spec": {**spec, "tie_embeddings": True, "norm_epsilon": 1e-3}}


def test_renamed_fields_keep_their_values():
    """Catches defaults put in the place of a rotary base, an epsilon or a norm that was saved."""
    old = version_1(rope_base=500.0, qk_norm=True)
    new = migrated(old)
    assert new["version"] == VERSION and old["version"] == 1 and "norm_epsilon" in old["spec"]
    spec = from_json(new["spec"])
    assert isinstance(spec, ModelSpec) and spec.norm == RMSNorm(epsilon=1e-3)
    mixer = spec.layers[0].mixer
    assert mixer.rope == Rope(base=500.0)
    assert mixer.qk_norm == ProjectionNorm(norm=RMSNorm(epsilon=1e-3))
    assert spec.layers[1].mixer is None
    plain = from_json(migrated(version_1(qk_norm=False))["spec"])
    assert plain.layers[0].mixer.qk_norm is None and plain.layers[0].mixer.rope == Rope()


@pytest.mark.parametrize("name", ["nano", "nano_dense", "reference", "reference_dense"])
def test_shipped_models_are_read(name):
    """Catches a manifest of version 1 that is refused; they lie in assets/ as they were written."""
    folder = find_resource("assets", name)
    assert json.loads((folder / "model.json").read_text())["version"] == 1
    spec = load_spec(folder)
    assert all(layer.mixer.rope == Rope() for layer in spec.layers)


def test_a_migrated_model_is_saved_as_a_new_one(tmp_path):
    """Catches a migration that loses weights, and a version that stays behind its fields."""
    model = load_model(find_resource("assets", "nano"))
    save_model(tmp_path, model, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "model.json").read_text())["version"] == VERSION
    again = load_model(tmp_path)
    assert again.spec == model.spec
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(parameters(again)[name], value)


def test_versions_that_never_were_are_refused(tmp_path):
    """Catches a lookup that fails with a KeyError, and a version below 1 read as the newest."""
    save_model(tmp_path, load_model(find_resource("assets", "nano")))
    path = tmp_path / "model.json"
    for version in (0, -1, VERSION + 1):
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
        with pytest.raises(CheckpointError, match="version"):
            load_spec(tmp_path)


def test_codes_that_lie_elsewhere_now_are_refused():
    """Catches 3-bit models of version 1 read in the order of version 2: noise without an error."""

    def packed(bits):
        return {"format": "Packed", "meta": {"bits": bits, "group": 32}, "leaves": {}}

    for bits in (3, 5, 6, 7):
        inner = {"format": "Sum", "meta": {}, "leaves": {"terms.0": packed(bits)}}
        with pytest.raises(CheckpointError, match=f"w has codes of {bits} bits"):
            migrated({**version_1(), "parameters": {"w": inner}})
    for bits in (1, 2, 4, 8):
        migrated({**version_1(), "parameters": {"w": packed(bits)}})
    migrated({**version_1(), "version": VERSION, "parameters": {"w": packed(3)}})
