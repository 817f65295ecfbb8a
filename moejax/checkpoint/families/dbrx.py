"""DBRX: experts chosen by softmax, gates over their p-norm; LayerNorms without bias; queries, keys
and values in one matrix, clipped."""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import ACTIVATIONS, activation_name, the_one
from moejax.checkpoint.family import ROTARY, Family
from moejax.checkpoint.rope_config import read_rope, rope_fields
from moejax.checkpoint.rules import Rule, Transposed, copied, transposed
from moejax.models import AttentionSpec, LayerNorm, LayerSpec, ModelSpec
from moejax.moe import Gates, MoESpec, PNormGates, RouterSpec, SoftmaxGates, TopK

_BLOCK = "transformer.blocks.{l}"
_ORDER = "moe_normalize_expert_weights"
_ATTENTION, _EXPERTS = f"{_BLOCK}.norm_attn_norm", f"{_BLOCK}.ffn.experts.mlp"


def _spec(config: ConfigReader) -> ModelSpec:
    width, heads = config.integer("d_model"), config.integer("n_heads")
    attention, ffn = config.needed_table("attn_config"), config.needed_table("ffn_config")
    head_width = width // max(heads, 1)
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=attention.integer("kv_n_heads"),
        head_width=head_width,
        rope=read_rope(config, head_width, base=attention.number("rope_theta", 10_000.0)),
        clip=attention.optional_number("clip_qkv"),
    )
    act = ffn.table("ffn_act_fn")
    # The release leaves the field out and means 1; null means that gates are not normalised.
    order = ffn.optional_number(_ORDER) if ffn.has(_ORDER) else 1.0
    gates: Gates = SoftmaxGates() if order is None else PNormGates(order=order)
    routed = MoESpec(
        experts=ffn.integer("moe_num_experts"),
        width=ffn.integer("ffn_hidden_size"),
        router=RouterSpec(selector=TopK(k=ffn.integer("moe_top_k")), gates=gates),
        activation=act.choice("name", ACTIVATIONS) if act else ACTIVATIONS["silu"],
    )
    config.require("tie_word_embeddings", False)
    return ModelSpec(
        vocab=config.integer("vocab_size"),
        width=width,
        layers=(LayerSpec(mixer=mixer, ffn=routed),) * config.depth("n_layers"),
        tie_embeddings=False,
        norm=LayerNorm(bias=False),
    )


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    rope = rope_fields(mixer.rope, mixer.head_width)
    return {
        "vocab_size": spec.vocab,
        "d_model": spec.width,
        "n_heads": mixer.heads,
        "n_layers": len(spec.layers),
        "attn_config": {
            "kv_n_heads": mixer.kv_heads,
            "clip_qkv": mixer.clip,
            "rope_theta": rope["rope_theta"],
        },
        "ffn_config": {
            "ffn_act_fn": {"name": activation_name(ffn.activation)},
            "ffn_hidden_size": ffn.width,
            "moe_num_experts": ffn.experts,
            "moe_top_k": getattr(ffn.router.selector, "k", 0),
            _ORDER: getattr(ffn.router.gates, "order", None),
        },
        "tie_word_embeddings": spec.tie_embeddings,
        **rope,
    }


FAMILY = Family(
    model_types=("dbrx",),
    architecture="DbrxForCausalLM",
    spec=_spec,
    config=_config,
    rules=(
        Rule("embed", "transformer.wte.weight"),
        *copied(
            {
                "layers.{l}.attention_norm.scale": f"{_ATTENTION}.norm_1.weight",
                "layers.{l}.ffn_norm.scale": f"{_ATTENTION}.norm_2.weight",
                "final_norm.scale": "transformer.norm_f.weight",
            }
        ),
        Rule(
            tuple(f"layers.{{l}}.attention.{name}" for name in "qkv"),
            f"{_ATTENTION}.attn.Wqkv.weight",
            Transposed(),
        ),
        *transposed(
            {
                "layers.{l}.attention.o": f"{_ATTENTION}.attn.out_proj.weight",
                "layers.{l}.moe.router.scores.kernel": f"{_BLOCK}.ffn.router.layer.weight",
                "head": "lm_head.weight",
            }
        ),
        Rule("layers.{l}.moe.experts.gate", f"{_EXPERTS}.w1", Transposed(), joined=True),
        Rule("layers.{l}.moe.experts.up", f"{_EXPERTS}.v1", Transposed(), joined=True),
        Rule("layers.{l}.moe.experts.down", f"{_EXPERTS}.w2", joined=True),
    ),
    ignored=(ROTARY,),
)
