"""Specs of models: what each layer is. Layers may differ after pruning, merging or dropping."""

from __future__ import annotations

from moejax.core import check_that, spec
from moejax.moe import Activation, MoESpec, SiLU


@spec
class AttentionSpec:
    """Causal self-attention with rotary positions and grouped query heads (arXiv:2305.13245).

    qk_norm: an RMSNorm over the whole query and key projections before the heads are split (OLMoE).
    """

    heads: int
    kv_heads: int
    head_width: int
    rope_base: float = 10_000.0
    qk_norm: bool = False

    def check(self) -> None:
        for field in ("heads", "kv_heads", "head_width"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        check_that(
            self.heads % self.kv_heads == 0,
            self,
            "kv_heads",
            f"It must divide heads = {self.heads}.",
        )
        check_that(
            self.head_width % 2 == 0, self, "head_width", "Rotary positions need an even width."
        )


@spec
class DenseSpec:
    """A gated dense feed-forward of hidden width `width`."""

    width: int
    activation: Activation = SiLU()

    def check(self) -> None:
        check_that(self.width >= 1, self, "width", "Give the hidden width of the feed-forward.")


@spec
class LayerSpec:
    """One block: a mixer and a feed-forward; None where it was dropped."""

    mixer: AttentionSpec | None
    ffn: MoESpec | DenseSpec | None


@spec
class ModelSpec:
    """A decoder language model.

    vocab: V; width: D; init_scale: standard deviation of the initial matrices.
    """

    vocab: int
    width: int
    layers: tuple[LayerSpec, ...]
    tie_embeddings: bool = True
    norm_epsilon: float = 1e-5
    init_scale: float = 0.02

    def check(self) -> None:
        check_that(self.vocab >= 2, self, "vocab", "A language model needs at least two tokens.")
        check_that(self.width >= 1, self, "width", "Give the model width D.")
        check_that(
            self.norm_epsilon > 0, self, "norm_epsilon", "It keeps the norm finite; try 1e-5."
        )
        check_that(self.init_scale > 0, self, "init_scale", "Try 0.02.")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a routed feed-forward."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.ffn, MoESpec))


def even_attention(
    width: int, heads: int, kv_heads: int, rope_base: float = 10_000.0
) -> AttentionSpec:
    """Attention whose heads share the model width D evenly; SpecError if they cannot."""
    probe = AttentionSpec(heads=heads, kv_heads=kv_heads, head_width=2, rope_base=rope_base)
    check_that(width % heads == 0, probe, "heads", f"It must divide the model width {width}.")
    return AttentionSpec(
        heads=heads, kv_heads=kv_heads, head_width=width // heads, rope_base=rope_base
    )
