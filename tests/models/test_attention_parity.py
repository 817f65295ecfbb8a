"""Attention against the modules of transformers, with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core import compat
from moejax.models import (
    AttentionSpec,
    HeadNorm,
    LongRope,
    MLASpec,
    ProjectionNorm,
    RMSNorm,
    Rope,
    RotatedHeadNorm,
    YaRN,
    yarn_mscale,
)
from tests.models.mixing import at_once, built

pytestmark = pytest.mark.parity
WIDTH, LENGTH = 24, 9
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "intermediate_size": 8,
    "attn_implementation": "eager",
    "max_position_embeddings": 64,
}
GROUPED = AttentionSpec(heads=4, kv_heads=2, head_width=8)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 7,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
}
STRETCHED = YaRN(
    factor=4.0,
    original_length=16,
    fast=2.0,
    slow=0.5,
    scale=yarn_mscale(4.0, 0.7) / yarn_mscale(4.0, 1.2),
)
MLA = MLASpec(
    heads=4,
    nope_width=8,
    rope_width=8,
    value_width=5,
    kv_rank=6,
    q_rank=7,
    rope=Rope(base=100.0, interleaved=True, scaling=STRETCHED),
    scale=16**-0.5 * yarn_mscale(4.0, 1.2) ** 2,
)
DIVISORS = ((1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0))
PLAIN = {"rope_type": "default", "rope_theta": 100.0}

CASES = {
    "olmoe": (
        {"clip_qkv": 0.8, "num_key_value_heads": 4, "head_dim": 6, "rope_parameters": PLAIN},
        AttentionSpec(
            heads=4,
            kv_heads=4,
            head_width=6,
            rope=Rope(base=100.0),
            qk_norm=ProjectionNorm(),
            clip=0.8,
        ),
    ),
    "qwen3_moe": (
        {"rms_norm_eps": 1e-6, "rope_parameters": PLAIN},
        dataclasses.replace(
            GROUPED, rope=Rope(base=100.0), qk_norm=HeadNorm(norm=RMSNorm(epsilon=1e-6))
        ),
    ),
    "glm4_moe": (
        {
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5},
        },
        dataclasses.replace(
            GROUPED, rope=Rope(base=100.0, width=4), qk_norm=HeadNorm(), qkv_bias=True
        ),
    ),
    "hunyuan_v1_moe": (
        {"rope_parameters": PLAIN},
        dataclasses.replace(GROUPED, rope=Rope(base=100.0), qk_norm=RotatedHeadNorm()),
    ),
    "granitemoe": (
        {"attention_multiplier": 0.2, "head_dim": 6, "rope_parameters": PLAIN},
        AttentionSpec(heads=4, kv_heads=2, head_width=6, rope=Rope(base=100.0), scale=0.2),
    ),
    "phimoe": (
        {
            "attention_bias": True,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": list(DIVISORS[0]),
                "long_factor": list(DIVISORS[1]),
                "short_mscale": 1.2,
                "long_mscale": 1.4,
                "original_max_position_embeddings": 16,
            },
        },
        dataclasses.replace(
            GROUPED,
            qkv_bias=True,
            o_bias=True,
            rope=Rope(
                base=100.0,
                scaling=LongRope(
                    short=DIVISORS[0],
                    long=DIVISORS[1],
                    original_length=16,
                    short_scale=1.2,
                    long_scale=1.4,
                ),
            ),
        ),
    ),
    "gpt_oss": (
        {"sliding_window": 3, "rope_parameters": {**YARN, "truncate": False}},
        dataclasses.replace(
            GROUPED,
            qkv_bias=True,
            o_bias=True,
            sinks=True,
            window=3,
            rope=Rope(
                base=100.0,
                scaling=YaRN(factor=4.0, original_length=16, fast=2.0, slow=0.5, whole=False),
            ),
        ),
    ),
    "deepseek_v2": (LATENT, MLA),
    "deepseek_v3": (LATENT, MLA),
}
NAMES = {  # ours -> transformers'
    **{name: f"{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"{name}_proj.bias" for name in "qkvo"},
    "q_norm.scale": "q_norm.weight",
    "k_norm.scale": "k_norm.weight",
    "sinks": "sinks",
    "q_down": "q_a_proj.weight",
    "q_up": "q_b_proj.weight",
    "kv_down": "kv_a_proj_with_mqa.weight",
    "kv_up": "kv_b_proj.weight",
    "kv_norm.scale": "kv_a_layernorm.weight",
}
LATENT_NAMES = {**NAMES, "q_norm.scale": "q_a_layernorm.weight"}
HUNYUAN_NAMES = {
    **NAMES,
    "q_norm.scale": "query_layernorm.weight",
    "k_norm.scale": "key_layernorm.weight",
}


@pytest.mark.parametrize("family", CASES)
def test_attention_equals_that_of_transformers(family):
    """Catches a misreading that our own formulas share: the order of norm, clip and rotation, the
    window's end, the sink, mscale taken once, values before keys."""
    torch = pytest.importorskip("torch", reason="parity wants torch and transformers")
    transformers = pytest.importorskip("transformers")
    fields, spec = CASES[family]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    attention = model.layers[0].self_attn
    module = built(spec, width=WIDTH)
    names = HUNYUAN_NAMES if family.startswith("hunyuan") else NAMES
    names = LATENT_NAMES if isinstance(spec, MLASpec) else names
    state = {}
    for path, variable in _variables(module):
        value = np.asarray(compat.read(variable))
        state[names[path]] = torch.tensor(value.T.copy())
    attention.load_state_dict(state)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    hidden = torch.tensor(np.asarray(x))
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    with torch.no_grad():
        rotary = model.rotary_emb(hidden, position_ids=positions)
        gap = positions[0][:, None] - positions[0][None]
        window = getattr(spec, "window", None) or LENGTH
        hides = torch.where((gap < 0) | (gap >= window), torch.finfo(torch.float32).min, 0.0)
        expected = attention(
            hidden_states=hidden,
            position_embeddings=rotary,
            attention_mask=hides[None, None].expand(2, 1, -1, -1),
        )[0].numpy()
    y = at_once(module, jnp.asarray(x))[0]
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def _variables(module):
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            yield ".".join(map(str, path)), node
