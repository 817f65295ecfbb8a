"""Yuan 2.0-M32 (arXiv:2405.17976): attention among experts as router, localized filtering.

Followed: yuan_moe_hf_model.py of IEIT-Yuan/Yuan2.0-M32 (model_type "yuan"). Queries and keys come
from the filtered input. The release has one matrix of heads q k q k ..., of which q_proj is the
upper half and k_proj the lower: q_proj holds queries and keys of the first half of the heads.
Rotary positions turn hidden_size / heads dimensions of each head, which attention_projection_size
makes wider. The release rounds rotary angles to bfloat16; here they are float32. With
`norm_topk_prob` gates are the softmax over the chosen experts (vLLM's top-k before softmax).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import (
    activation_name,
    model_config,
    read_decoder,
    the_one,
)
from moejax.checkpoint.family import ENDS, NORMS, Family
from moejax.checkpoint.rules import Place, Rule, Transposed, copied, transposed
from moejax.core import CheckpointError
from moejax.models import AttentionSpec, LayerSpec, LocalFilterSpec, ModelSpec, RMSNorm, Rope
from moejax.moe import (
    AttentionScores,
    ChosenSoftmaxGates,
    Gates,
    MoESpec,
    RouterSpec,
    SoftmaxGates,
    TopK,
)

_LAYER = "model.layers.{l}"
_ATTENTION, _MLP = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"
_FILTER = f"{_ATTENTION}.lf_gate"
_BASE = 10_000.0  # in no config


@dataclasses.dataclass(frozen=True)
class HeadsInTurn:
    """Columns q k q k ... of heads on disk are all queries, then all keys, here."""

    def forward(self, x: np.ndarray, place: Place) -> np.ndarray:
        heads = x.reshape(*x.shape[:-1], -1, 2, self._width(place))
        return heads.swapaxes(-2, -3).reshape(x.shape)

    def inverse(self, x: np.ndarray, place: Place) -> np.ndarray:
        heads = x.reshape(*x.shape[:-1], 2, -1, self._width(place))
        return heads.swapaxes(-2, -3).reshape(x.shape)

    def _width(self, place: Place) -> int:
        assert place.layer is not None
        mixer = place.spec.layers[place.layer].mixer
        assert isinstance(mixer, AttentionSpec)
        return mixer.head_width


@dataclasses.dataclass(frozen=True)
class PairOfTokens:
    """A torch Conv2d of kernel (2, 1), [N, K, 2, 1], is [2 K, N] here: the token before first."""

    def forward(self, x: np.ndarray, place: Place) -> np.ndarray:
        return x[..., 0].transpose(2, 1, 0).reshape(-1, x.shape[0])

    def inverse(self, x: np.ndarray, place: Place) -> np.ndarray:
        return x.reshape(2, -1, x.shape[-1]).transpose(2, 1, 0)[..., None]


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("use_shareqk", False)
    config.require("causal_mask", True)
    for field in ("rope_scaling", "num_key_value_heads"):
        config.require(field)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    whole = config.integer("attention_projection_size", width)
    head_width, rotated = whole // max(heads, 1), width // max(heads, 1)
    mixer = AttentionSpec(
        heads=heads,
        kv_heads=heads,
        head_width=head_width,
        rope=Rope(base=_BASE, width=None if rotated == head_width else rotated),
        filter=LocalFilterSpec(norm=RMSNorm(epsilon=1e-6)),
    )
    routed = config.needed_table("moe_config")
    routed.require("gated_linear_unit", True)
    gates: Gates = SoftmaxGates()
    if routed.flag("norm_topk_prob", True):
        gates = ChosenSoftmaxGates()
    ffn = MoESpec(
        experts=routed.integer("moe_num_experts"),
        width=routed.integer("ffn_hidden_size"),
        router=RouterSpec(
            selector=TopK(k=routed.integer("moe_top_k")), gates=gates, scores=AttentionScores()
        ),
        activation=config.activation(default="silu"),
    )
    return read_decoder(config, LayerSpec(mixer=mixer, ffn=ffn), tied=True)


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn, mixer = the_one(spec, "ffn", MoESpec), the_one(spec, "mixer", AttentionSpec)
    if mixer.rope is None or mixer.rope.base != _BASE:
        raise CheckpointError(f"Yuan's rotary base is {_BASE:g} always.", "Keep the model here.")
    return model_config(spec) | {
        "hidden_act": activation_name(ffn.activation),
        "num_attention_heads": mixer.heads,
        "attention_projection_size": mixer.context_width,
        "use_shareqk": False,
        "causal_mask": True,
        "moe_config": {
            "moe_num_experts": ffn.experts,
            "moe_top_k": getattr(ffn.router.selector, "k", 0),
            "ffn_hidden_size": ffn.width,
            "norm_topk_prob": isinstance(ffn.router.gates, ChosenSoftmaxGates),
            "gated_linear_unit": True,
        },
    }


FAMILY = Family(
    model_types=("yuan",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(
        *NORMS,
        *ENDS,
        Rule(
            ("layers.{l}.attention.q", "layers.{l}.attention.k"),
            (f"{_ATTENTION}.q_proj.weight", f"{_ATTENTION}.k_proj.weight"),
            Transposed(),
            HeadsInTurn(),
        ),
        Rule("layers.{l}.attention.filter.first", f"{_FILTER}.conv1.weight", PairOfTokens()),
        Rule("layers.{l}.attention.filter.second", f"{_FILTER}.conv2.weight", PairOfTokens()),
        *copied(
            {
                "layers.{l}.attention.filter.first_bias": f"{_FILTER}.conv1.bias",
                "layers.{l}.attention.filter.second_bias": f"{_FILTER}.conv2.bias",
                "layers.{l}.attention.filter.norm.scale": f"{_FILTER}.output_layernorm.weight",
            }
        ),
        *transposed(
            {f"layers.{{l}}.attention.{n}": f"{_ATTENTION}.{n}_proj.weight" for n in "vo"}
            | {
                f"layers.{{l}}.moe.router.scores.{name}": f"{_MLP}.gate.{name}.weight"
                for name in ("query", "key", "value")
            }
            | {"layers.{l}.moe.experts.down": f"{_MLP}.experts.{{e}}.w2.weight"}
        ),
        Rule(
            ("layers.{l}.moe.experts.gate", "layers.{l}.moe.experts.up"),
            f"{_MLP}.experts.{{e}}.w1.weight",
            Transposed(),
        ),
    ),
)
