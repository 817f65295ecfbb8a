"""What each family's config says and does not say: nothing that changes a model is left out."""

import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.exporting import described
from moejax.checkpoint.families import families
from moejax.checkpoint.importing import read_spec
from moejax.core import CheckpointError
from moejax.models import YaRN
from moejax.moe import PNormGates, SoftmaxGates
from tests.checkpoint.hf_folders import FULL, L, W

# The renormalised gates of FULL are not DeepSeek-V2's; DBRX has its norm between its own fields.
OF_FAMILY = {"deepseek_v2": {"norm_topk_prob": False}}
NAMES = [
    "mixtral", "olmoe", "llama", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe", "gpt_oss",
    "hunyuan_v1_moe", "deepseek_v2", "deepseek_v3", "dbrx", "phimoe",
]  # fmt: skip


def read(name, **changed):
    """The spec of the full config with changes; a field of None is taken away."""
    fields = FULL | OF_FAMILY.get(name, {}) | changed
    fields = {
        key: value for key, value in fields.items() if key not in changed or value is not None
    }
    return read_spec(families()[name], ConfigReader(fields))


def again(name, spec):
    """The spec as its family writes and reads it."""
    return read_spec(families()[name], ConfigReader(described(spec, families()[name])))


@pytest.mark.parametrize("name", NAMES)
def test_each_family_reads_what_it_writes(name):
    """Catches a field that export forgets, which a default then replaces."""
    spec = read(name)
    assert again(name, spec) == spec


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS)
SMALL = st.integers(0, 4) | st.sampled_from([0.0, -1.0, 1e-320, 1e300])


@given(
    name=st.sampled_from(NAMES),
    changed=st.dictionaries(st.sampled_from(sorted(FULL)), SMALL | VALUES, max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_any_config_of_any_family_comes_in_and_goes_out_or_is_named(name, changed):
    """Catches a raw error: a multiplier of which the inverse is taken, a logarithm of one."""
    with contextlib.suppress(CheckpointError):
        described(read(name, **changed), families()[name])


@pytest.mark.parametrize("factor", [1.0, 4.0, 8.0, 40.0])
@pytest.mark.parametrize("weight", [0.1, 0.5, 0.707, 0.9, 1.0, 1.0 / 3.0])
def test_stretched_latent_attention_goes_out_and_in(factor, weight):
    """Catches an export refused for the last bit of a softmax scale, or by a division by ln 1."""
    scaling = {
        "type": "yarn",
        "factor": factor,
        "mscale": weight,
        "mscale_all_dim": weight,
        "original_max_position_embeddings": 4096,
    }
    for name in ("deepseek_v2", "deepseek_v3"):
        spec = read(name, rope_scaling=scaling, rope_parameters=None)
        mixer = spec.layers[0].mixer
        assert isinstance(mixer.rope.scaling, YaRN) and (mixer.scale is None) == (factor == 1)
        assert again(name, spec) == spec


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("deepseek_v3", "n_group"), ("deepseek_v3", "routed_scaling_factor"),
        ("deepseek_v3", "first_k_dense_replace"), ("gpt_oss", "rope_parameters"),
    ],
)  # fmt: skip
def test_no_default_stands_for_what_transformers_fills_in_otherwise(name, field):
    """Catches a model read by moejax's defaults where the family's config class has others."""
    with pytest.raises(CheckpointError, match=field):
        read(name, **{field: None})


def test_windows_of_gpt_oss_have_the_width_of_its_class():
    """Catches full attention in every layer where the width is not written."""
    windows = [layer.mixer.window for layer in read("gpt_oss", sliding_window=None).layers]
    assert windows == [128, None]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt_oss", {"layer_types": [["full_attention"]] * L}),
        ("gpt_oss", {"layer_types": ["full_attention"]}),
        ("qwen3_moe", {"mlp_only_layers": [[0]]}),
        ("granitemoe", {"logits_scaling": 0.0}),
        ("hunyuan_v1_moe", {"use_cla": True}),
        ("hunyuan_v1_moe", {"use_qk_norm": False}),
        ("hunyuan_v1_moe", {"num_shared_expert": [2] * L}),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [7] * L}),
        ("hunyuan_v1_moe", {"attention_head_dim": W + 2}),
        ("hunyuan_v1_moe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ],
)
def test_what_would_change_the_model_is_refused(name, fields):
    """Catches a field that is read past: another attention, experts of another width."""
    (field,) = fields
    with pytest.raises(CheckpointError, match=f"{field}|rotary positions"):
        read(name, **fields)


def test_the_config_of_hunyuan_a13b_comes_in():
    """Catches the release's own fields refused: lists with a number per layer, alpha as scaling."""
    spec = read(
        "hunyuan_v1_moe",
        rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32},
        rope_theta=10_000.0,
        rope_parameters=None,
        moe_topk=[2] * L,
        num_shared_expert=[1] * L,
        moe_intermediate_size=[FULL["intermediate_size"]] * L,
        attention_head_dim=W,
        use_qk_norm=True,
    )
    rope = spec.layers[0].mixer.rope
    assert rope.scaling is None and rope.base == 10_000.0 * 1000.0 ** (W / (W - 2))
    assert again("hunyuan_v1_moe", spec) == spec


def test_a_yarn_scale_that_divides_by_nothing_is_refused():
    """Catches 0.1 w ln(4) + 1 = 0 below a fraction, at w = -10 / ln(4)."""
    scaling = {"type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": -10 / math.log(4)}
    with pytest.raises(CheckpointError, match="mscale_all_dim"):
        read("llama", rope_scaling=scaling | {"original_max_position_embeddings": 8})


def test_dbrx_normalises_unless_its_config_says_null():
    """Catches the release's gates left as they are: its config has no word of their norm."""
    table = FULL["ffn_config"]
    for fields, gates in (
        (table, PNormGates(order=1.0)),
        (table | {"moe_normalize_expert_weights": 2.0}, PNormGates(order=2.0)),
        (table | {"moe_normalize_expert_weights": None}, SoftmaxGates()),
    ):
        spec = read("dbrx", ffn_config=fields)
        assert spec.layers[0].ffn.router.gates == gates
        assert again("dbrx", spec) == spec


def test_older_scaling_goes_before_newer_parameters():
    """Catches another choice than transformers' where a config has both."""
    spec = read("llama", rope_scaling={"type": "linear", "factor": 4.0})
    assert spec.layers[0].mixer.rope.scaling.factor == 4.0
