"""Config fields and names that DeepSeek's models share with those built after them."""

from __future__ import annotations

import math
from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import the_one
from moejax.checkpoint.family import DECODER, DENSE, EXPERTS, ROUTER
from moejax.checkpoint.rope_config import read_rope, rope_fields
from moejax.checkpoint.rules import Ignored, copied, transposed
from moejax.models import DenseSpec, LayerSpec, Mixer, MLASpec, ModelSpec, YaRN, yarn_mscale
from moejax.moe import BiasedTopK, GroupLimited, MoESpec, RouterSpec, SigmoidGates

_MLP = "model.layers.{l}.mlp"

SHARED_EXPERTS = transposed(
    {
        f"layers.{{l}}.moe.shared.{name}": f"{_MLP}.shared_experts.{name}_proj.weight"
        for name in ("gate", "up", "down")
    }
)
ROUTER_BIAS = copied(
    {"layers.{l}.moe.router.selector.bias": f"{_MLP}.gate.e_score_correction_bias"}
)
EXTRA_PREDICTION = Ignored(
    "model.layers.{beyond}.*",
    "multi-token prediction",
    beside="model.layers.{beyond}.eh_proj.weight",
)


_ATTENTION = "model.layers.{l}.self_attn"
DEEPSEEK = (
    *DECODER,
    *transposed(
        {
            f"layers.{{l}}.attention.{ours}": f"{_ATTENTION}.{theirs}.weight"
            for ours, theirs in (
                ("q_down", "q_a_proj"),
                ("q_up", "q_b_proj"),
                ("kv_down", "kv_a_proj_with_mqa"),
                ("kv_up", "kv_b_proj"),
            )
        }
    ),
    *copied(
        {
            "layers.{l}.attention.q_norm.scale": f"{_ATTENTION}.q_a_layernorm.weight",
            "layers.{l}.attention.kv_norm.scale": f"{_ATTENTION}.kv_a_layernorm.weight",
        }
    ),
    *DENSE,
    *ROUTER,
    *EXPERTS,
    *SHARED_EXPERTS,
)


def read_latent_attention(config: ConfigReader, interleaved: bool = True) -> MLASpec:
    """Multi-head latent attention (arXiv:2405.04434).

    Where rotary positions are stretched and the config has mscale_all_dim, logits are scaled by the
    square of its YaRN factor, which is 1 where texts become no longer.
    """
    config.require("attention_bias", False)
    nope, rope_width = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    rope = read_rope(config, rope_width, interleaved=interleaved)
    scale = None
    if isinstance(rope.scaling, YaRN) and rope.scaling.factor > 1:
        weight = config.rope().number("mscale_all_dim", 0.0)
        scale = _stretched(nope + rope_width, rope.scaling, weight) if weight else None
    return MLASpec(
        heads=config.integer("num_attention_heads"),
        nope_width=nope,
        rope_width=rope_width,
        value_width=config.integer("v_head_dim"),
        kv_rank=config.integer("kv_lora_rank"),
        q_rank=config.optional_integer("q_lora_rank"),
        rope=rope,
        scale=scale,
    )


def latent_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields that `read_latent_attention` reads."""
    mixer = the_one(spec, "mixer", MLASpec)
    fields = {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "qk_nope_head_dim": mixer.nope_width,
        "qk_rope_head_dim": mixer.rope_width,
        "v_head_dim": mixer.value_width,
        "kv_lora_rank": mixer.kv_rank,
        "q_lora_rank": mixer.q_rank,
        "attention_bias": False,
        **rope_fields(mixer.rope, mixer.rope_width),
    }
    scaling = mixer.rope.scaling
    if mixer.scale is not None and isinstance(scaling, YaRN) and scaling.factor > 1:
        weight = _weight_of(mixer.scale, mixer.nope_width + mixer.rope_width, scaling)
        fields["rope_parameters"]["mscale_all_dim"] = weight
    return fields


def _stretched(width: int, scaling: YaRN, weight: float) -> float:
    """The scale of logits of heads of this width at mscale_all_dim = weight."""
    return width**-0.5 * yarn_mscale(scaling.factor, weight) ** 2


def _weight_of(scale: float, width: int, scaling: YaRN) -> float:
    """The inverse of `_stretched`: of the numbers within rounding, one that gives `scale` exactly,
    so that a config read back is the same; a short one where there is such a one."""
    exact = ((scale * width**0.5) ** 0.5 - 1) / (0.1 * math.log(scaling.factor))
    near = [round(exact, 12), exact, math.nextafter(exact, 0), math.nextafter(exact, math.inf)]
    return next((w for w in near if _stretched(width, scaling, w) == scale), exact)


def read_biased_router(config: ConfigReader) -> RouterSpec:
    """DeepSeek-V3's: sigmoid, a bias for selection alone, groups (arXiv:2412.19437).

    Groups and scale must be in the config: what their lack means differs between families.
    """
    selector: BiasedTopK | GroupLimited = BiasedTopK(k=config.integer("num_experts_per_tok"))
    if (groups := config.integer("n_group")) > 1:
        kept = config.integer("topk_group")
        selector = GroupLimited(selector=selector, groups=groups, kept=kept, best=2)
    gates = SigmoidGates(
        renormalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor"),
    )
    return RouterSpec(selector=selector, gates=gates)


def biased_router_config(ffn: MoESpec) -> dict[str, Any]:
    """The fields that `read_biased_router` reads."""
    return router_size_config(ffn) | {
        "norm_topk_prob": getattr(ffn.router.gates, "renormalise", True),
        "routed_scaling_factor": getattr(ffn.router.gates, "scale", 1.0),
    }


def router_size_config(ffn: MoESpec) -> dict[str, Any]:
    """How many experts there are, in how many groups, and how many are chosen."""
    selector = ffn.router.selector
    limited = selector if isinstance(selector, GroupLimited) else None
    return {
        "n_routed_experts": ffn.experts,
        "num_experts_per_tok": getattr(selector, "k", 0),
        "n_group": limited.groups if limited else 1,
        "topk_group": limited.kept if limited else 1,
        "moe_intermediate_size": ffn.width,
        "n_shared_experts": ffn.shared_width // ffn.width,
    }


def read_first_dense(config: ConfigReader, mixer: Mixer, routed: MoESpec) -> tuple[LayerSpec, ...]:
    """The first first_k_dense_replace layers dense, all others routed."""
    config.require("moe_layer_freq", 1)
    dense = DenseSpec(width=config.integer("intermediate_size"), activation=routed.activation)
    first = config.integer("first_k_dense_replace")
    return tuple(
        LayerSpec(mixer=mixer, ffn=dense if i < first else routed)
        for i in range(config.depth("num_hidden_layers"))
    )


def first_dense_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields that `read_first_dense` reads."""
    first = sum(isinstance(layer.ffn, DenseSpec) for layer in spec.layers)
    routed = the_one(spec, "ffn", MoESpec)
    width = the_one(spec, "ffn", DenseSpec).width if first else routed.width
    return {"first_k_dense_replace": first, "intermediate_size": width}
