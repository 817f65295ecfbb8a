"""OpenMoE (arXiv:2402.01739) as its released port computes it.

Followed: ColossalAI's examples/language/openmoe (modeling_openmoe.py, convert_openmoe_ckpt.py) and
colossalai/moe (Top1Router, Top2Router). Every feed-forward has a gate matrix twice as wide. A block
with experts has a dense feed-forward after them, with a norm of its own, which the paper puts
beside them: here that is a layer without a mixer. Logits of attention are not scaled, the rotary
base is 10000, tokens over an expert's room are dropped in evaluation too. In the port a token that
is decoded alone is turned by one position too many; here it stands where it stood in the text.
The port's config class is Llama's, so that `architectures` tells its models. T5X names come in
after its converter has renamed them.
"""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import model_config, read_decoder, the_one
from moejax.checkpoint.family import DECODER, DENSE, Family
from moejax.checkpoint.rules import Rule, Transposed, copied, transposed
from moejax.core import CheckpointError
from moejax.models import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, RMSNorm, Rope
from moejax.moe import ChoiceCapacity, MoESpec, NestedSwiGLU, RouterSpec, SoftmaxGates, TopK

_LAYER = "model.layers.{l}"
_ROPE, _SCALE = Rope(base=10_000.0), 1.0


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("hidden_act", "swiglu")
    for fields, only in (
        (("mlp_gated", "gated"), True),
        (("router_drop_tks", "drop_tks"), True),
        (("enable_load_balance",), False),
    ):
        for field in fields:
            config.require(field, only)
    k = config.integer("router_topk", config.integer("topk", 2))
    if k not in (1, 2):
        config.refuse("router_topk", "1 or 2: the port queues more choices by probability")
    heads, width = config.integer("num_attention_heads"), config.integer("intermediate_size")
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_width=config.integer("head_dim"),
        rope=_ROPE,
        scale=_SCALE,
    )
    routed = MoESpec(
        experts=config.integer("num_experts"),
        width=width,
        router=RouterSpec(selector=TopK(k=k), gates=SoftmaxGates()),
        dispatch=ChoiceCapacity(
            factor=config.number(
                "router_capacity_factor_eval", config.number("capacity_factor_eval", 2.0)
            ),
            least=config.integer("router_min_capacity", config.integer("min_capacity", 4)),
        ),
        activation=NestedSwiGLU(),
    )
    dense = DenseSpec(width=width, activation=NestedSwiGLU())
    every = config.integer("moe_layer_interval")
    if every < 1:
        config.refuse("moe_layer_interval", "a number of at least 1")
    layers: list[LayerSpec] = []
    for block in range(config.depth("num_hidden_layers")):
        if (block + 1) % every:
            layers.append(LayerSpec(mixer=mixer, ffn=dense))
        else:
            layers += [LayerSpec(mixer=mixer, ffn=routed), LayerSpec(mixer=None, ffn=dense)]
    norm = RMSNorm(epsilon=config.number("rms_norm_eps", 1e-6))
    return read_decoder(config, layers, norm=norm)


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    if not isinstance(ffn.dispatch, ChoiceCapacity):
        raise CheckpointError(
            f"OpenMoE drops tokens over an expert's room, the model has {ffn.dispatch}.",
            "Keep the model here, or give it ChoiceCapacity.",
        )
    return model_config(spec) | {
        "hidden_act": "swiglu",
        "mlp_gated": True,
        "num_hidden_layers": sum(layer.mixer is not None for layer in spec.layers),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_width,
        "intermediate_size": ffn.width,
        "num_experts": ffn.experts,
        "moe_layer_interval": spec.moe_layers[0] + 1,
        "router_topk": getattr(ffn.router.selector, "k", 0),
        "router_capacity_factor_eval": ffn.dispatch.factor,
        "router_min_capacity": ffn.dispatch.least,
        "router_drop_tks": True,
    }


def _second(layer: LayerSpec) -> bool:
    return layer.mixer is None


FAMILY = Family(
    model_types=("openmoe",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(
        Rule(
            "layers.{l}.ffn_norm.scale", f"{_LAYER}.pre_extra_mlp_layernorm.weight", layers=_second
        ),
        *(
            Rule(
                f"layers.{{l}}.ffn.{name}",
                f"{_LAYER}.extra_mlp.{name}_proj.weight",
                Transposed(),
                layers=_second,
            )
            for name in ("gate", "up", "down")
        ),
        *DECODER,
        *DENSE,
        *transposed({"layers.{l}.moe.router.scores.kernel": f"{_LAYER}.mlp.gate_weight"}),
        *copied(
            {
                f"layers.{{l}}.moe.experts.{ours}": f"{_LAYER}.mlp.experts.{theirs}"
                for ours, theirs in (("gate", "wi_gate"), ("up", "wi_up"), ("down", "wo"))
            }
        ),
    ),
    classes=("OpenMoeForCausalLM",),
)
