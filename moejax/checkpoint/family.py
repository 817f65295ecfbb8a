"""A family of models on Hugging Face's hub: its config fields and its names, as one small value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.rules import Ignored, Rule, copied, transposed
from moejax.models import ModelSpec

ROTARY = Ignored("*.rotary_emb.inv_freq", "rotary frequencies, which the config gives")


@dataclasses.dataclass(frozen=True)
class Family:
    """What a file of `families/` defines as FAMILY.

    model_types: values of config.json's model_type, the first one for export.
    architecture: class of transformers that export names; empty where there is none.
    spec: the model that a config describes; raises CheckpointError naming a field.
    config: the inverse: the fields that describe a spec. What it cannot express shows when the
    result is read back, so it checks nothing itself.
    rules: ordered. A parameter comes from the first rule that has its name and whose tensor is in
    the files; it goes out by the first that has its name.
    classes: names in config.json's `architectures` that make it this family's whatever model_type
    says: remote code that was built on another family's config.
    ignored: tensors that the files of this family hold and the model does not need.
    """

    model_types: tuple[str, ...]
    architecture: str
    spec: Callable[[ConfigReader], ModelSpec]
    config: Callable[[ModelSpec], dict[str, Any]]
    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = (ROTARY,)
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.model_types[0]


_MLP = "model.layers.{l}.mlp"

# Names that most families share, from Llama's. A family lists what it changes before them.

ATTENTION = transposed(
    {
        f"layers.{{l}}.attention.{name}": f"model.layers.{{l}}.self_attn.{name}_proj.weight"
        for name in "qkvo"
    }
)
ATTENTION_BIASES = copied(
    {
        f"layers.{{l}}.attention.{name}_bias": f"model.layers.{{l}}.self_attn.{name}_proj.bias"
        for name in "qkvo"
    }
)
QK_NORM = copied(
    {
        f"layers.{{l}}.attention.{name}.scale": f"model.layers.{{l}}.self_attn.{name}.weight"
        for name in ("q_norm", "k_norm")
    }
)
NORMS = copied(
    {
        "layers.{l}.attention_norm.scale": "model.layers.{l}.input_layernorm.weight",
        "layers.{l}.ffn_norm.scale": "model.layers.{l}.post_attention_layernorm.weight",
        "final_norm.scale": "model.norm.weight",
    }
)
ENDS = (
    Rule("embed", "model.embed_tokens.weight"),
    *transposed({"head": "lm_head.weight"}),
)
DENSE = transposed(
    {f"layers.{{l}}.ffn.{name}": f"{_MLP}.{name}_proj.weight" for name in ("gate", "up", "down")}
)
ROUTER = transposed({"layers.{l}.moe.router.scores.kernel": f"{_MLP}.gate.weight"})
EXPERTS = transposed(
    {
        f"layers.{{l}}.moe.experts.{name}": f"{_MLP}.experts.{{e}}.{name}_proj.weight"
        for name in ("gate", "up", "down")
    }
)
DECODER = (*ATTENTION, *NORMS, *ENDS)
