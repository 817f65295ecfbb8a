"""Saved models: exact round trips, honest sizes, and damage that is noticed and named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.checkpoint import (
    load_model,
    load_spec,
    payload_bytes,
    read_manifest,
    save_model,
    stored_bytes,
)
from moejax.core import CheckpointError
from moejax.models import abstract_model, parameters, with_parameters
from tests.weights.contract import FORMATS

GATE = "layers.0.moe.experts.gate"
BIAS = "layers.0.moe.router.selector.bias"


@pytest.fixture
def saved(tmp_path, spec, named):
    save_model(tmp_path, with_parameters(spec, named), facts={"steps": 3})
    return tmp_path


def _bits(weight):
    return {n: (a.dtype, np.asarray(a).tobytes()) for n, a in weights.flatten(weight).items()}


def _edit(folder, change):
    data = json.loads((folder / "model.json").read_text())
    change(data)
    (folder / "model.json").write_text(json.dumps(data))


@pytest.mark.parametrize("build", [b for _, b in FORMATS], ids=[name for name, _ in FORMATS])
def test_every_format_comes_back_bit_for_bit(tmp_path, spec, named, build):
    """Catches a leaf saved under a clashing name, cast to float32, or rebuilt with other meta."""
    given = named | {GATE: build((4,), 7)[0]}
    model = with_parameters(spec, given)
    save_model(tmp_path, model)
    found = parameters(load_model(tmp_path))
    assert set(found) == set(given)
    assert jax.tree.structure(found[GATE]) == jax.tree.structure(given[GATE])
    for name, weight in found.items():
        assert _bits(weight) == _bits(given[name]), name


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_sizes_are_those_of_the_file(tmp_path, spec, named, dtype):
    """Catches a payload that counts the header, the padding, or bytes before the cast."""
    model = with_parameters(spec, named | {GATE: FORMATS[1][1]((4,), 0)[0]})
    save_model(tmp_path, model, dtype=dtype)
    file = (tmp_path / "model.safetensors").read_bytes()
    payload = len(file) - 8 - int.from_bytes(file[:8], "little")
    assert stored_bytes(tmp_path) == payload == payload_bytes(model, dtype)
    abstract = abstract_model(spec, read_manifest(tmp_path).formats)
    assert payload_bytes(abstract, dtype) == payload


def test_storage_in_bfloat16_rounds_parameters_and_nothing_else(tmp_path, spec, named):
    """Catches bfloat16 applied to a format's scales or to the bias of a router."""
    packed = FORMATS[1][1]((4,), 0)[0]
    save_model(tmp_path, with_parameters(spec, named | {GATE: packed}), dtype=jnp.bfloat16)
    found = parameters(load_model(tmp_path))
    rounded = named["embed"].astype(jnp.bfloat16).astype(jnp.float32)
    assert _bits(found["embed"]) == _bits(rounded)
    assert _bits(found[GATE]) == _bits(packed)
    assert _bits(found[BIAS]) == _bits(named[BIAS])
    assert parameters(load_model(tmp_path, dtype=None))["embed"].dtype == jnp.bfloat16


def test_manifest_holds_spec_and_facts(saved, spec):
    """Catches a spec that loses a field or a default on its way through JSON."""
    assert load_spec(saved) == spec
    assert read_manifest(saved).facts == {"steps": 3}


def test_a_truncated_file_is_refused(saved):
    """Catches a loader that reads what is there and fills the rest."""
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(saved)


def test_a_changed_byte_is_refused(saved):
    """Catches a check of sizes only: a flipped bit gives numbers that look right."""
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="hash"):
        load_model(saved)


def test_a_save_that_was_killed_between_its_files_leaves_no_model(saved, spec, named, monkeypatch):
    """Catches a manifest written first, beside which old or missing tensors look whole."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moejax.checkpoint.manifest.write_json", killed)
    changed = with_parameters(spec, named | {"embed": named["embed"] + 1})
    with pytest.raises(KeyboardInterrupt):
        save_model(saved / "new", changed)
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(saved / "new")
    with pytest.raises(KeyboardInterrupt):
        save_model(saved, changed)
    with pytest.raises(CheckpointError, match="hash"):
        load_model(saved)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_nan_is_named_on_save_and_on_load(tmp_path, spec, named, value, monkeypatch):
    """Catches NaN weights that travel silently; files of other origin are checked on load too."""
    broken = named | {"embed": named["embed"].at[1, 2].set(value)}
    with pytest.raises(CheckpointError, match="'embed'"):
        save_model(tmp_path, with_parameters(spec, broken))
    monkeypatch.setattr("moejax.checkpoint.manifest.check_finite", lambda *_: None)
    save_model(tmp_path, with_parameters(spec, broken))
    with pytest.raises(CheckpointError, match="'embed'"):
        load_model(tmp_path)


def test_another_spec_is_named_by_its_first_field(saved, spec):
    """Catches a comparison that says only that specs differ."""
    assert load_model(saved, spec=spec).spec == spec
    wider = dataclasses.replace(spec.layers[0].ffn, width=8)
    other = dataclasses.replace(spec, layers=(dataclasses.replace(spec.layers[0], ffn=wider),))
    with pytest.raises(CheckpointError, match=r"layers\[0\]\.ffn\.width is 6, expected 8"):
        load_model(saved, spec=other)
    deeper = dataclasses.replace(spec, layers=spec.layers * 2)
    with pytest.raises(CheckpointError, match=r"layers has 1 entries, expected 2"):
        load_model(saved, spec=deeper)


def test_a_manifest_of_another_spec_than_its_tensors_is_refused(saved):
    """Catches a spec edited by hand: shapes are held against it, not only against the manifest."""
    _edit(saved, lambda data: data["spec"].update(vocab=25))
    with pytest.raises(CheckpointError, match="embed"):
        load_model(saved)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/hostname", "a/b", "..", "a\\b", ""])
def test_tensor_files_stay_in_their_folder(saved, file):
    """Catches a manifest that makes the loader read anywhere on the machine."""
    _edit(saved, lambda data: data["tensors"].update(file=file))
    with pytest.raises(CheckpointError, match="not a name in its folder"):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(version=99),
        lambda data: data.pop("spec"),
        lambda data: data.update(parameters=[]),
        lambda data: data["tensors"].pop("sha256"),
        lambda data: data["spec"].update(type="Popen"),
        lambda data: data["parameters"].pop("embed"),
        lambda data: data["parameters"]["embed"].update(format="Pickle"),
        lambda data: data["parameters"]["embed"]["leaves"].update({"": [[23, 32], "float32"]}),
        lambda data: data["parameters"].update(extra=data["parameters"]["embed"]),
    ],
)
def test_a_damaged_manifest_is_a_checkpoint_error(saved, change):
    """Catches KeyError and TypeError tracebacks in place of an error that says what to do."""
    _edit(saved, change)
    with pytest.raises(CheckpointError):
        load_model(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_a_manifest_that_is_no_json_object(saved, content):
    """Catches a manifest cut off by a full disk read as an empty model."""
    (saved / "model.json").write_text(content)
    with pytest.raises(CheckpointError):
        load_spec(saved)
