"""Skywork-MoE (arXiv:2406.06563): router logits of two layers, brought to a standard deviation.

Config fields are those of the release's SkyworkMoeConfig (model_type "skywork"); names and the gate
those of the layers that SkyworkAI's MoE-plus-plus shares with it: a router is tanh between two
matrices without bias, 8 E wide (equation 6 of the report has one matrix with a bias), and experts
lie under `mlp.moe.experts.experts`. torch.std divides by E - 1; the mean that equation 7 takes away
does not change a softmax. Gates of the two chosen are renormalised. Experts see twice their input
unless `moe_use_mixtral_gating` or `moe_feature_no_mul_topk` is true. A vLLM patched for its fp8
files divides the deviation by itself, which makes all logits equal; this follows the report.
"""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import (
    activation_name,
    decoder_config,
    read_attention,
    read_decoder,
    the_one,
)
from moejax.checkpoint.family import DECODER, DENSE, Family
from moejax.checkpoint.rules import Rule, Transposed, transposed
from moejax.models import DenseSpec, LayerSpec, ModelSpec
from moejax.moe import (
    LinearScores,
    MoESpec,
    RouterSpec,
    ScaledInput,
    Scores,
    SoftmaxGates,
    StandardisedScores,
    TanhScores,
    TopK,
)

_MOE = "model.layers.{l}.mlp.moe"
_K = 2  # MOE_TOP_K of its code, in no config


def _spec(config: ConfigReader) -> ModelSpec:
    plain = config.activation(default="silu")
    once = [
        config.flag(field, False) for field in ("moe_use_mixtral_gating", "moe_feature_no_mul_topk")
    ]
    experts, width = config.uniform("num_experts", 32), config.integer("intermediate_size")
    scores: Scores = LinearScores()
    if config.flag("moe_2layer_gate", True):
        scores = TanhScores(hidden=8 * experts)
    deviation = config.number("moe_gate_norm_std", 1.0)
    if config.flag("moe_use_logits_norm", False):
        scores = StandardisedScores(scores=scores, deviation=deviation, correction=1)
    ffn = MoESpec(
        experts=experts,
        width=width,
        router=RouterSpec(selector=TopK(k=_K), gates=SoftmaxGates(renormalise=True), scores=scores),
        activation=plain if any(once) else ScaledInput(factor=float(_K), activation=plain),
    )
    mixer, dense = read_attention(config), DenseSpec(width=width, activation=plain)
    every = config.integer("moe_expert_interval", 1)
    if every < 1:
        config.refuse("moe_expert_interval", "a number of at least 1")
    return read_decoder(
        config,
        tuple(
            LayerSpec(mixer=mixer, ffn=dense if (i + 1) % every else ffn)
            for i in range(config.depth("num_hidden_layers"))
        ),
    )


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    scores, activation = ffn.router.scores, ffn.activation
    deviation, doubled = None, False
    if isinstance(scores, StandardisedScores):
        scores, deviation = scores.scores, scores.deviation
    if isinstance(activation, ScaledInput):
        activation, doubled = activation.activation, True
    return decoder_config(spec, None) | {
        "hidden_act": activation_name(activation),
        "num_experts": [ffn.experts],
        "intermediate_size": ffn.width,
        "moe_expert_interval": spec.moe_layers[0] + 1,
        "moe_use_mixtral_gating": False,
        "moe_feature_no_mul_topk": not doubled,
        "moe_2layer_gate": isinstance(scores, TanhScores),
        "moe_use_logits_norm": deviation is not None,
        "moe_gate_norm_std": 1.0 if deviation is None else deviation,
    }


def _two_layers(layer: LayerSpec) -> bool:
    scores = layer.ffn.router.scores if isinstance(layer.ffn, MoESpec) else None
    scores = scores.scores if isinstance(scores, StandardisedScores) else scores
    return isinstance(scores, TanhScores)


FAMILY = Family(
    model_types=("skywork",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        *DENSE,
        Rule(
            "layers.{l}.moe.router.scores.kernel",
            f"{_MOE}.gate.wg.2.weight",
            Transposed(),
            layers=_two_layers,
        ),
        *transposed(
            {
                "layers.{l}.moe.router.scores.hidden": f"{_MOE}.gate.wg.0.weight",
                "layers.{l}.moe.router.scores.kernel": f"{_MOE}.gate.wg.weight",
            }
            | {
                f"layers.{{l}}.moe.experts.{n}": f"{_MOE}.experts.experts.{{e}}.{n}_proj.weight"
                for n in ("gate", "up", "down")
            }
        ),
    ),
)
