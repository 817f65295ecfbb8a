"""Rotary positions as configs of released models describe them, read and written."""

from __future__ import annotations

import math
from typing import Any

from moejax.checkpoint.config_reader import ConfigReader
from moejax.core import CheckpointError
from moejax.models import (
    LinearScaling,
    Llama3Scaling,
    LongRope,
    Rope,
    RopeScaling,
    YaRN,
    yarn_mscale,
)

_LONGEST = 1 << 40  # tokens
_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def read_rope(
    config: ConfigReader,
    head_width: int,
    base: float = 10_000.0,
    share: float = 1.0,
    interleaved: bool = False,
) -> Rope:
    """The rotation of heads of this width.

    base, share: what a missing rope_theta and partial_rotary_factor mean in this family.

    Raises CheckpointError for a kind of scaling that is not known here.
    """
    table = config.rope()
    share = table.number("partial_rotary_factor", config.number("partial_rotary_factor", share))
    width = int(head_width * share)
    return Rope(
        base=table.number("rope_theta", base),
        width=None if width == head_width else width,
        interleaved=interleaved,
        scaling=_read_scaling(table, config, width // 2),
    )


def read_alpha_rope(config: ConfigReader) -> Rope | None:
    """What Hunyuan's "dynamic" scaling with an alpha means: base * alpha^(W / (W - 2)) for heads of
    width W, whatever the length of a text. None where the config has no such scaling."""
    table = config.rope()
    if table.raw("rope_type") != "dynamic" or table.raw("alpha") is None:
        return None
    heads = max(config.integer("num_attention_heads"), 1)
    width = config.integer("head_dim", config.integer("hidden_size") // heads)
    alpha = table.number("alpha")
    if width < 4 or alpha <= 0:
        table.refuse("alpha", "a number above 0, for heads of at least 4 dimensions")
    return Rope(base=table.number("rope_theta", 10_000.0) * alpha ** (width / (width - 2)))


def _read_scaling(table: ConfigReader, config: ConfigReader, pairs: int) -> RopeScaling | None:
    kind = table.choice("rope_type", dict(zip(_TYPES, _TYPES, strict=True)))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=table.number("factor"))
    grown_length = config.integer("max_position_embeddings", 0, most=_LONGEST)
    original = table.integer(
        "original_max_position_embeddings",
        config.integer("original_max_position_embeddings", grown_length, most=_LONGEST),
        most=_LONGEST,
    )
    if original < 2:
        table.refuse("original_max_position_embeddings", "the length of a text, at least 2")
    if kind == "llama3":
        return Llama3Scaling(
            factor=table.number("factor"),
            low_factor=table.number("low_freq_factor"),
            high_factor=table.number("high_freq_factor"),
            original_length=original,
        )
    factor = table.number("factor", (grown_length or original) / original)
    if kind == "yarn":
        return YaRN(
            factor=factor,
            original_length=original,
            fast=table.number("beta_fast", 32.0),
            slow=table.number("beta_slow", 1.0),
            scale=_yarn_scale(table, factor),
            whole=table.flag("truncate", True),
        )
    return _read_long_rope(table, original, factor, pairs)


def _yarn_scale(table: ConfigReader, factor: float) -> float | None:
    """What the config says of the scale of sine and cosine, None where it says nothing."""
    if table.raw("attention_factor") is not None:
        return table.number("attention_factor")
    mscale, of_all = table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0)
    if mscale and of_all:
        if of_all < 0:
            table.refuse("mscale_all_dim", "a number of at least 0")
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, of_all)
    return None


def _read_long_rope(table: ConfigReader, original: int, factor: float, pairs: int) -> LongRope:
    """Scales are the config's short_mscale and long_mscale (Phi-3.5-MoE), else one for both."""
    plain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    scale = table.number("attention_factor", plain)
    return LongRope(
        short=table.numbers("short_factor", pairs),
        long=table.numbers("long_factor", pairs),
        original_length=original,
        short_scale=table.number("short_mscale", scale),
        long_scale=table.number("long_mscale", scale),
    )


def rope_fields(rope: Rope | None, head_width: int) -> dict[str, Any]:
    """The config fields that `read_rope` reads; CheckpointError without rotary positions."""
    if rope is None:
        raise CheckpointError(
            "the model's attention has no rotary positions, which this family needs.",
            "Export to another family.",
        )
    fields: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    fields["partial_rotary_factor"] = rope.rotated(head_width) / head_width
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        fields |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        fields |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_factor,
            "high_freq_factor": scaling.high_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    elif isinstance(scaling, YaRN):
        fields |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "truncate": scaling.whole,
        }
        if scaling.scale is not None:
            fields["attention_factor"] = scaling.scale
    elif isinstance(scaling, LongRope):
        fields |= {
            "rope_type": "longrope",
            "short_factor": list(scaling.short),
            "long_factor": list(scaling.long),
            "original_max_position_embeddings": scaling.original_length,
            "short_mscale": scaling.short_scale,
            "long_mscale": scaling.long_scale,
        }
        if scaling.short_scale == scaling.long_scale:  # what transformers reads but for phimoe
            fields["attention_factor"] = scaling.long_scale
    elif scaling is not None:
        raise CheckpointError(
            f"transformers has no rotary scaling {type(scaling).__name__}.", "Keep the model here."
        )
    return {"rope_theta": rope.base, "rope_parameters": fields}
