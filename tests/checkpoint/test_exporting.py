"""Models go out: names and layout of the family, packed weights beside, all or nothing."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import weights
from moejax.checkpoint import export_model, import_model
from moejax.checkpoint.families import families
from moejax.checkpoint.rules import Interleaved, Rule, Transposed
from moejax.core import CheckpointError, RunError
from moejax.files import open_tensors, read_safetensors
from moejax.models import layers, parameters, select_experts, with_layers, with_parameters
from moejax.weights import SymmetricGrid
from tests.checkpoint.hf_folders import MIXTRAL, E, mixtral_tensors, write_folder


@pytest.fixture(scope="module")
def tensors():
    return mixtral_tensors()


@pytest.fixture(scope="module")
def imported(tmp_path_factory, tensors):
    return import_model(write_folder(tmp_path_factory.mktemp("in"), MIXTRAL, tensors))


def test_what_came_in_goes_out_bit_for_bit(tmp_path, imported, tensors):
    """Catches a transposed matrix, a forgotten tensor, a config field that changed on the way."""
    export_model(tmp_path / "out", imported.model, config=imported.config, shard_bytes=4000)
    found = open_tensors(tmp_path / "out")
    assert set(found) == set(tensors) and len(found.files) > 1
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name].read(), value)
    biggest = max(a.nbytes for a in tensors.values())
    assert all(sum(t.nbytes for t in found.values() if t.path == f) <= max(4000, biggest)
               for f in found.files)  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"] and config["dtype"] == "float32"
    assert {key: config[key] for key in MIXTRAL} == MIXTRAL


@pytest.mark.parametrize(
    "rules",
    [
        (  # granitemoe: stacked, gate and up one behind the other
            Rule(("{x}gate", "{x}up"), "L.{l}.in", Transposed()),
            Rule("{x}down", "L.{l}.out", Transposed()),
        ),
        (  # gpt-oss: stacked, already [K, N], gate and up in turns
            Rule(("{x}gate", "{x}up"), "L.{l}.gate_up", split=Interleaved()),
            Rule("{x}down", "L.{l}.down"),
        ),
        (  # dbrx: experts one behind the other, the last matrix not transposed
            Rule("{x}gate", "L.{l}.w1", Transposed(), joined=True),
            Rule("{x}up", "L.{l}.v1", Transposed(), joined=True),
            Rule("{x}down", "L.{l}.w2", joined=True),
        ),
    ],
    ids=["granite", "gpt_oss", "dbrx"],
)
def test_every_layout_of_experts_goes_out_and_in(tmp_path, imported, rules, monkeypatch):
    """Catches experts cut at the wrong rows, and parts of a fused tensor exchanged."""
    named = [
        Rule(
            tuple(p.replace("{x}", "layers.{l}.moe.experts.") for p in rule.parameters),
            rule.tensor, *rule.steps, split=rule.split, joined=rule.joined,
        )
        for rule in rules
    ]  # fmt: skip
    family = dataclasses.replace(
        families()["mixtral"], rules=(*named, *families()["mixtral"].rules)
    )
    monkeypatch.setitem(families(), "mixtral", family)
    export_model(tmp_path / "out", imported.model, family=family)
    before, found = parameters(imported.model), open_tensors(tmp_path / "out")
    gate, down = (np.asarray(before[f"layers.1.moe.experts.{n}"]) for n in ("gate", "down"))
    first = found[rules[0].tensor.format(l=1)].read()
    if "in" in rules[0].tensor.split("."):
        np.testing.assert_array_equal(first[1, : gate.shape[2]], gate[1].T)
    elif "gate_up" in rules[0].tensor:
        np.testing.assert_array_equal(first[1, :, ::2], gate[1])
    else:
        np.testing.assert_array_equal(first.reshape(E, -1, gate.shape[1])[1], gate[1].T)
        np.testing.assert_array_equal(found["L.1.w2"].read().reshape(down.shape), down)
    after = parameters(import_model(tmp_path / "out").model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_packed_experts_lie_beside_their_values(tmp_path, imported):
    """Catches codes that do not give the weights that transformers loads."""
    grid = SymmetricGrid(bits=4, group=None)
    named = parameters(imported.model)
    name = "layers.1.attention.o"  # 24 inputs fill 4-bit words; these experts' 5 do not
    named[name] = grid(named[name])
    export_model(tmp_path / "out", with_parameters(imported.model.spec, named))
    meta = json.loads((tmp_path / "out" / "packed.json").read_text())["parameters"]
    assert set(meta) == {name}
    leaves = read_safetensors(tmp_path / "out" / "packed.safetensors")
    mine = {leaf.removeprefix(f"{name}."): jnp.asarray(a) for leaf, a in leaves.items()}
    weight = weights.unflatten(meta[name], mine)
    stored = open_tensors(tmp_path / "out" / "model.safetensors")
    values = stored["model.layers.1.self_attn.o_proj.weight"].read()
    np.testing.assert_array_equal(values.T, weight.materialize())
    words, scale = leaves[f"{name}.words"], leaves[f"{name}.scale"]  # as docs/ describes them
    codes = words[:, None] >> (4 * np.arange(8, dtype=np.uint32))[:, None] & 15
    plain = (codes.reshape(values.T.shape).astype(np.float32) - 8) * scale.astype(np.float32)
    np.testing.assert_array_equal(values.T, plain)
    assert not np.array_equal(values.T, parameters(imported.model)[name])


def test_what_a_family_cannot_say_is_named(tmp_path, imported):
    """Catches a pruned model written under a config that describes another."""
    model = imported.model
    blocks = [select_experts(layers(model)[0], [0, 2]), layers(model)[1]]
    with pytest.raises(CheckpointError, match=r"layers\[1\]\.ffn\.experts is 2, expected 3"):
        export_model(tmp_path / "out", with_layers(model, blocks), family=imported.family)
    with pytest.raises(CheckpointError, match="no family"):
        export_model(tmp_path / "out", with_layers(model, blocks))
    assert list(tmp_path.iterdir()) == []
    both = with_layers(model, [select_experts(block, [2, 0]) for block in layers(model)])
    export_model(tmp_path / "out", both, config=imported.config)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 2)
    found = parameters(import_model(tmp_path / "out").model)["layers.0.moe.experts.up"]
    np.testing.assert_array_equal(found[0], parameters(model)["layers.0.moe.experts.up"][2])


def test_an_export_is_there_whole_or_not_at_all(tmp_path, imported):
    """Catches half a folder left behind, or one that is written over."""
    named = parameters(imported.model)
    named["final_norm.scale"] = named["final_norm.scale"].at[0].set(jnp.inf)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        export_model(tmp_path / "out", with_parameters(imported.model.spec, named))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(RunError, match="there already"):
        export_model(tmp_path / "out", imported.model)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_no_field_of_the_original_contradicts_an_edited_model(tmp_path, imported):
    """Catches rope_scaling left beside the rotary positions written anew: transformers takes it."""
    older = {"rope_scaling": {"type": "linear", "factor": 8.0}, "max_position_embeddings": 64}
    export_model(tmp_path / "out", imported.model, config={**imported.config, **older})
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_scaling" not in found and found["rope_parameters"]["rope_type"] == "default"
    assert (found["max_position_embeddings"], found["bos_token_id"]) == (64, 1)


def test_remote_code_of_the_original_is_not_named_again(tmp_path, imported):
    """Catches an auto_map or a quantization_config that no longer fits the folder."""
    config = {**imported.config, "auto_map": {"AutoModel": "x.Y"}, "quantization_config": {}}
    export_model(tmp_path / "out", imported.model, config=config)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & set(found)
