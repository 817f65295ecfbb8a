"""Hunyuan-Large (arXiv:2411.02265): one routed and one shared expert, keys shared between layers.

Followed: models/modeling_hunyuan.py of Tencent-Hunyuan-Large (model_type "hunyuan"). A single
chosen expert counts p itself, which transformers' hunyuan_v1_moe makes 1; of several, gates are p
over their sum. In evaluation an expert has room for all tokens, so that nothing is recycled. Every
cla_share_factor-th layer has keys and values; those above it read them as they were before the
rotation, each with a norm of its own after it. Dynamic rotary scaling with an `alpha` is a larger
base, theta alpha^(w / (w - 2)), and goes out as one. The release rounds frequencies to bfloat16;
here they are float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import (
    decoder_config,
    read_attention,
    read_decoder,
    read_norm,
    the_one,
)
from moejax.checkpoint.family import ATTENTION_BIASES, DECODER, EXPERTS, Family
from moejax.checkpoint.rope_config import read_alpha_rope
from moejax.checkpoint.rules import copied, transposed
from moejax.models import (
    AttentionSpec,
    EarlierKV,
    LayerSpec,
    ModelSpec,
    RotatedHeadNorm,
    SharedKV,
)
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK

_LAYER = "model.layers.{l}"
_ATTENTION, _MLP = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("use_pack_kv", False)
    config.require("mlp_bias", False)
    bias = config.flag("attention_bias", False)
    normed = config.flag("use_qk_norm", False)
    fields: dict[str, Any] = {"qkv_bias": bias, "o_bias": bias}
    if normed:
        fields["qk_norm"] = RotatedHeadNorm(norm=read_norm(config))
    if (rope := read_alpha_rope(config)) is not None:
        fields["rope"] = rope
    own = read_attention(config, **fields)
    width, k = config.integer("intermediate_size"), config.uniform("moe_topk", 1)
    shared = config.uniform("num_shared_expert", 1)
    ffn = MoESpec(
        experts=config.uniform("num_experts"),
        width=width,
        router=RouterSpec(selector=TopK(k=k), gates=SoftmaxGates(renormalise=k > 1)),
        activation=config.activation(default="silu"),
        shared_width=width * shared if config.flag("use_mixed_mlp_moe", False) else 0,
    )
    if ffn.experts < 2:
        config.refuse("num_experts", "at least 2: its code makes a model of one expert dense")
    factor = config.integer("cla_share_factor", 1) if config.flag("use_cla", False) else 1
    if factor < 1:
        config.refuse("cla_share_factor", "a number of at least 1")
    first = own if factor == 1 else dataclasses.replace(own, kv=SharedKV())
    later = dataclasses.replace(own, kv=EarlierKV())
    return read_decoder(
        config,
        tuple(
            LayerSpec(mixer=later if i % factor else first, ffn=ffn)
            for i in range(config.depth("num_hidden_layers"))
        ),
    )


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    apart = [i for i, layer in enumerate(spec.layers) if not layer.reads]
    factor = (apart[1] if len(apart) > 1 else len(spec.layers)) if mixer.writes else 1
    shares = ffn.shared_width // ffn.width
    return decoder_config(spec, ffn) | {
        "num_experts": ffn.experts,
        "moe_topk": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width,
        "use_mixed_mlp_moe": shares > 0,
        "num_shared_expert": max(shares, 1),
        "use_qk_norm": mixer.qk_norm is not None,
        "attention_bias": mixer.qkv_bias,
        "use_cla": factor > 1,
        "cla_share_factor": factor,
        "rope_scaling": None,
    }


FAMILY = Family(
    model_types=("hunyuan",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *ATTENTION_BIASES,
        *EXPERTS,
        *copied(
            {
                "layers.{l}.attention.q_norm.scale": f"{_ATTENTION}.query_layernorm.weight",
                "layers.{l}.attention.k_norm.scale": f"{_ATTENTION}.key_layernorm.weight",
            }
        ),
        *transposed(
            {"layers.{l}.moe.router.scores.kernel": f"{_MLP}.gate.wg.weight"}
            | {
                f"layers.{{l}}.moe.shared.{name}": f"{_MLP}.shared_mlp.{name}_proj.weight"
                for name in ("gate", "up", "down")
            }
        ),
    ),
)
