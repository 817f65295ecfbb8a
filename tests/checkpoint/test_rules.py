"""Rules read what they write, and read what a file's layout says."""

import contextlib
import dataclasses

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.coverage import cover
from moejax.checkpoint.exporting import export_model
from moejax.checkpoint.families import families, family_of
from moejax.checkpoint.importing import load_tensors, read_spec
from moejax.checkpoint.rules import (
    Consecutive,
    Ignored,
    Interleaved,
    PairsToHalves,
    Place,
    Rule,
    Transposed,
)
from moejax.core import CheckpointError
from moejax.files import open_tensors
from moejax.models import AttentionSpec, DecoderLM, DenseSpec, LayerSpec, ModelSpec, parameters
from tests.checkpoint.hf_folders import FULL, MIXTRAL, W

BLOCK = LayerSpec(mixer=AttentionSpec(heads=2, kv_heads=1, head_width=4), ffn=None)
SECOND = LayerSpec(mixer=None, ffn=DenseSpec(width=4))


@pytest.fixture(scope="module")
def place():
    return Place(families()["mixtral"].spec(ConfigReader(MIXTRAL)), 1)


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


TURNS = [(Interleaved(), (12,)), (Interleaved(), (12, 12))]  # equal parts only
ROWS = [(Consecutive(), (12,)), (Consecutive(), (24, 12, 12))]


@pytest.mark.parametrize("steps", [(), (Transposed(),), (Transposed(), PairsToHalves())])
@pytest.mark.parametrize(("split", "widths"), [*ROWS, *TURNS])
def test_forward_undoes_inverse(place, steps, split, widths):
    """Catches a step or split whose two directions do not fit, in values or in shape."""
    parts = [numbers(5, width) + 1000 * i for i, width in enumerate(widths)]
    rule = Rule(tuple(f"p{i}" for i in range(len(parts))), "t", *steps, split=split)
    tensor = rule.inverse(parts, place)
    assert rule.shape([part.shape for part in parts], place) == tensor.shape
    for index, part in enumerate(parts):
        np.testing.assert_array_equal(rule.forward(tensor, index, widths, place), part)


def test_pairs_become_halves_in_each_head(place):
    """Catches a permutation over the whole projection instead of each head's width."""
    heads, steps = 2, PairsToHalves()
    x = numbers(1, heads * W)
    found = steps.forward(x, place)[0].reshape(heads, W)
    for head in range(heads):
        first = head * W
        evens, odds = range(first, first + W, 2), range(first + 1, first + W, 2)
        assert found[head].tolist() == [*evens, *odds]


def test_gate_and_up_take_turns():
    """Catches gpt-oss's gate_up read as two halves."""
    x = numbers(2, 6)
    np.testing.assert_array_equal(Interleaved().part(x, 0, (3, 3)), x[:, [0, 2, 4]])
    np.testing.assert_array_equal(Interleaved().part(x, 1, (3, 3)), x[:, [1, 3, 5]])


def test_ignored_names_mean_what_they_say():
    """Catches a multi-token-prediction layer taken for one of the model's, and the reverse."""
    layers = "model.layers.{beyond}."
    extra = Ignored(f"{layers}*", "a layer that predicts further tokens", beside=f"{layers}eh_proj")
    files = {"model.layers.61.eh_proj", "model.layers.60.eh_proj", "model.layers.70.eh_proj"}
    assert extra.match("model.layers.61.mlp.w", 61, files)
    assert extra.match("model.layers.70.mlp.w", 61, files)
    assert not extra.match("model.layers.60.mlp.w", 61, files)
    assert not extra.match("model.layers.62.mlp.w", 61, files)
    assert not extra.match("model.layers.x.mlp.w", 61, files)
    assert Ignored("*.inv_freq", "").match("model.layers.3.rotary_emb.inv_freq", 2, ())


def test_layers_that_the_config_forgets_are_not_ignored():
    """Catches a model cut short in silence: a layer of its own taken for one that predicts a second
    token, which has eh_proj."""
    family, spec = families()["glm4_moe"], read_spec(families()["glm4_moe"], ConfigReader(FULL))
    after = f"model.layers.{len(spec.layers)}"
    mtp = {f"{after}.{name}": None for name in ("input_layernorm.weight", "eh_proj.weight")}
    assert all(i.match(n, len(spec.layers), mtp) for i in family.ignored[1:] for n in mtp)
    own = {f"{after}.input_layernorm.weight": None}
    assert not any(i.match(n, len(spec.layers), own) for i in family.ignored for n in own)


def test_names_are_matched_whole():
    """Catches layer 1 of a pattern found in layer 11, or a suffix after a name."""
    rule = Rule("layers.{l}.ffn.up", "t.{l}")
    assert rule.match("layers.11.ffn.up") == (0, 11)
    for name in ("layers.1.ffn.up.scale", "xlayers.1.ffn.up", "layers.01.ffn.up", "layers..ffn.up"):
        assert rule.match(name) is None


def test_a_rule_may_be_for_some_layers_only():
    """Catches a second feed-forward read, or written, under the name of the first."""
    spec = ModelSpec(vocab=9, width=8, layers=(BLOCK, SECOND))
    rule = Rule("layers.{l}.ffn.up", "t.{l}", layers=lambda layer: layer.mixer is None)
    assert [rule.applies(Place(spec, i)) for i in (0, 1, None)] == [False, True, True]


def test_a_layer_without_mixer_has_the_number_of_the_block_below():
    """Catches blocks numbered as layers where a block of the files is two layers here."""
    spec = ModelSpec(vocab=9, width=8, layers=(BLOCK, BLOCK, SECOND, BLOCK, SECOND, BLOCK))
    assert [Place(spec, i).block for i in range(6)] == [0, 1, 1, 2, 2, 3]
    assert Place(spec, None).block is None


def test_several_tensors_are_parts_of_one(tmp_path, place):
    """Catches parts read in the wrong order, or only the first of them read or written."""
    both = Rule(
        ("layers.{l}.attention.q", "layers.{l}.attention.k"), ("a.{l}", "b.{l}"), Transposed()
    )
    mixtral = families()["mixtral"]
    family = dataclasses.replace(mixtral, rules=(both, *mixtral.rules))
    model = DecoderLM(place.spec, rngs=nnx.Rngs(0))
    export_model(tmp_path / "out", model, family=family)
    found, before = open_tensors(tmp_path / "out"), parameters(model)
    whole = np.concatenate([found["a.1"].read(), found["b.1"].read()])
    expected = [np.asarray(before[f"layers.1.attention.{n}"]).T for n in "qk"]
    np.testing.assert_array_equal(whole, np.concatenate(expected))
    coverage = cover(place.spec, family, found)
    again = parameters(load_tensors(place.spec, coverage, found))
    for name, value in before.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_a_class_built_on_another_config_is_known_by_its_name():
    """Catches OpenMoE, whose config says llama, read as a llama."""
    config = {"model_type": "llama", "architectures": ["OpenMoeForCausalLM"]}
    assert family_of(config).name == "openmoe"
    for classes in (None, "OpenMoeForCausalLM", [{}], ["LlamaForCausalLM"]):
        assert family_of(config | {"architectures": classes}).name == "llama"


@pytest.mark.parametrize("family", dict.fromkeys(families().values()), ids=lambda f: f.name)
def test_no_two_rules_share_a_tensor(family):
    """Catches a family that writes one tensor twice: the later would replace the earlier."""
    for some in (False, True):  # one for all layers and one for some of them may
        rules = [rule for rule in family.rules if (rule.layers is not None) == some]
        names = [tensor for rule in rules for tensor in rule.tensors]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None), ("hidden_size", -1), ("hidden_size", 2.5), ("hidden_size", True),
        ("rms_norm_eps", "x"), ("rms_norm_eps", float("nan")), ("hidden_act", "mish"),
        ("tie_word_embeddings", 1), ("sliding_window", 4096), ("num_hidden_layers", 1 << 39),
        ("num_hidden_layers", 0), ("rope_scaling", {"rope_type": "ntk", "factor": 4}),
        ("rope_scaling", {"type": "dynamic"}), ("rope_parameters", []),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_honoured_is_named(field, value):
    """Catches an unknown rope scaling, window or activation that is silently left out."""
    config = MIXTRAL | {field: value}
    with pytest.raises(CheckpointError) as caught:
        read_spec(families()["mixtral"], ConfigReader(config))
    named = caught.value.problem
    assert field in named or "rotary positions" in named


def test_rope_is_found_where_each_version_writes_it():
    """Catches a base of 10000 where transformers 5 keeps rope_theta in rope_parameters."""
    older = families()["mixtral"].spec(ConfigReader(MIXTRAL | {"rope_scaling": None}))
    newer = dict(MIXTRAL, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    del newer["rope_theta"]
    assert older == families()["mixtral"].spec(ConfigReader(newer))
    assert older.layers[0].mixer.rope.base == 1e6


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "llama"])
def test_config_and_spec_are_each_other_s_inverse(name):
    """Catches a field that export forgets, which a default then replaces."""
    family = families()[name]
    extra = {"num_experts": 7, "norm_topk_prob": True}
    spec = family.spec(ConfigReader(MIXTRAL | extra | {"hidden_act": "gelu", "model_type": name}))
    for tied in (True, False):
        changed = dataclasses.replace(spec, tie_embeddings=tied)
        assert family.spec(ConfigReader(family.config(changed))) == changed


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS)

ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "longrope", "default"])},
    optional=dict.fromkeys(
        ["factor", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
         "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "truncate",
         "mscale_all_dim", "attention_factor"],
        SCALARS | st.floats(0.1, 9) | st.integers(0, 9),
    ) | dict.fromkeys(["short_factor", "long_factor"], st.just([1.0, 2.0, 3.0]) | VALUES),
)  # fmt: skip


@given(changed=ROPES)
@settings(max_examples=200, deadline=None)
def test_any_rope_gives_a_spec_or_a_named_error(changed):
    """Catches a logarithm of nothing, a division by zero, a scaling that is half described."""
    with contextlib.suppress(CheckpointError):
        read_spec(families()["llama"], ConfigReader(MIXTRAL | {"rope_parameters": changed}))


@given(
    name=st.sampled_from(["mixtral", "olmoe", "llama"]),
    changed=st.dictionaries(st.sampled_from(sorted(MIXTRAL)), VALUES, min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_any_config_gives_a_spec_or_a_named_error(name, changed):
    """Catches a raw error, or memory taken for a number that is damage."""
    with contextlib.suppress(CheckpointError):
        read_spec(families()[name], ConfigReader(MIXTRAL | changed))


def test_the_largest_sizes_have_shapes_and_no_memory():
    """Catches an overflow, or arrays made, where a damaged config claims the most it may."""
    most = dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size"], 1 << 20)
    config = MIXTRAL | most | {"num_local_experts": 1 << 20, "head_dim": 1 << 20}
    spec = read_spec(families()["mixtral"], ConfigReader(config))
    with pytest.raises(CheckpointError, match="lack"):
        cover(spec, families()["mixtral"], {})
