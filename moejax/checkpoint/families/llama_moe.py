"""LLaMA-MoE (arXiv:2406.16554): the neurons of a dense LLaMA as experts.

Followed: modeling_llama_moe_hf.py of pjlab-sys4nlp/llama-moe (model_type "llama_moe"). The gate is
tanh between two matrices, E wide (`gate_network` "mlp"), or one matrix; the softmax runs over the
chosen experts, times `score_scale_factor`. `weight_noise` is used in training only.
"""

from __future__ import annotations

from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.decoder_config import decoder_config, read_attention, read_decoder, the_one
from moejax.checkpoint.family import DECODER, ROTARY, Family
from moejax.checkpoint.rules import Ignored, Rule, Transposed, transposed
from moejax.models import LayerSpec, ModelSpec
from moejax.moe import (
    ChosenSoftmaxGates,
    LinearScores,
    MoESpec,
    RouterSpec,
    Scores,
    TanhScores,
    TopK,
)

_MLP = "model.layers.{l}.mlp"
_GATE, _EXPERTS = f"{_MLP}.gate.gate_network", f"{_MLP}.calculator.experts"


def _spec(config: ConfigReader) -> ModelSpec:
    config.require("gate_type", "TopKBalancedNoisyGate")
    config.require("calculator_type", "UniversalCalculator")
    for field, only in (
        ("gate_use_softmax", True), ("multiply_gate_scores", True), ("add_weight_norm", False)
    ):  # fmt: skip
        config.require(field, only)
    experts = config.integer("num_experts", 16)
    two = config.choice("gate_network", {"mlp": True, "linear": False}, "mlp")
    scores: Scores = TanhScores(hidden=experts) if two else LinearScores()
    ffn = MoESpec(
        experts=experts,
        width=_width(config, experts),
        router=RouterSpec(
            selector=TopK(k=config.integer("num_selects", 4)),
            gates=ChosenSoftmaxGates(scale=_one_scale(config)),
            scores=scores,
        ),
        activation=config.activation(default="silu"),
    )
    return read_decoder(config, LayerSpec(mixer=read_attention(config), ffn=ffn))


def _width(config: ConfigReader, experts: int) -> int:
    """Of an expert: every E-th neuron, or what size_experts says where it says one number."""
    whole = config.integer("intermediate_size")
    if experts < 1 or whole % experts:
        config.refuse("intermediate_size", f"a multiple of num_experts = {experts}")
    sizes = config.raw("size_experts")
    rows = sizes if isinstance(sizes, list) else []
    flat = [size for row in rows for size in (row if isinstance(row, list) else [row])]
    if sizes is not None and (not flat or any(size != whole // experts for size in flat)):
        config.refuse("size_experts", f"experts that are all {whole // experts} wide")
    return whole // experts


def _one_scale(config: ConfigReader) -> float:
    """score_scale_factor, given once or as a list of equal ones for every layer."""
    scales = config.raw("score_scale_factor")
    if isinstance(scales, list) and scales and all(scale == scales[0] for scale in scales):
        return ConfigReader({"score_scale_factor": scales[0]}).number("score_scale_factor")
    return config.number("score_scale_factor", 1.0)


def _config(spec: ModelSpec) -> dict[str, Any]:
    ffn = the_one(spec, "ffn", MoESpec)
    return decoder_config(spec, ffn) | {
        "num_experts": ffn.experts,
        "num_selects": getattr(ffn.router.selector, "k", 0),
        "intermediate_size": ffn.width * ffn.experts,
        "size_experts": None,
        "score_scale_factor": getattr(ffn.router.gates, "scale", 1.0),
        "gate_network": "mlp" if isinstance(ffn.router.scores, TanhScores) else "linear",
        "gate_type": "TopKBalancedNoisyGate",
        "calculator_type": "UniversalCalculator",
        "gate_use_softmax": True,
        "multiply_gate_scores": True,
        "add_weight_norm": False,
    }


def _two_layers(layer: LayerSpec) -> bool:
    return isinstance(layer.ffn, MoESpec) and isinstance(layer.ffn.router.scores, TanhScores)


FAMILY = Family(
    model_types=("llama_moe",),
    architecture="",
    spec=_spec,
    config=_config,
    rules=(
        *DECODER,
        Rule(
            "layers.{l}.moe.router.scores.kernel",
            f"{_GATE}.2.weight",
            Transposed(),
            layers=_two_layers,
        ),
        *transposed(
            {
                "layers.{l}.moe.router.scores.hidden": f"{_GATE}.0.weight",
                "layers.{l}.moe.router.scores.kernel": f"{_GATE}.weight",
            }
            | {
                f"layers.{{l}}.moe.experts.{name}": f"{_EXPERTS}.weight_{name}.{{e}}"
                for name in ("gate", "up", "down")
            }
        ),
    ),
    ignored=(
        ROTARY,
        Ignored("model.layers.{l}.mlp.gate.weight_noise.weight", "noise of training's gate"),
    ),
)
