"""Specs of models: what each layer is. Layers may differ after pruning, merging or dropping."""

from __future__ import annotations

from moejax.core import SpecError, check_that, spec
from moejax.models.mixer import Mixer
from moejax.models.norm import NormSpec, RMSNorm
from moejax.moe import Activation, MoESpec, SiLU


@spec
class DenseSpec:
    """A gated dense feed-forward of hidden width `width`."""

    width: int
    activation: Activation = SiLU()

    def check(self) -> None:
        check_that(self.width >= 1, self, "width", "Give the hidden width of the feed-forward.")


@spec
class LayerSpec:
    """One block: a mixer and a feed-forward; None where it was dropped.

    dense_residual: a dense feed-forward beside the routed `ffn`; it takes what the mixer made of
    the block's input, the routed one the input itself, and both are added (Snowflake Arctic).
    """

    mixer: Mixer | None
    ffn: MoESpec | DenseSpec | None
    dense_residual: DenseSpec | None = None

    def check(self) -> None:
        check_that(
            self.dense_residual is None or isinstance(self.ffn, MoESpec),
            self,
            "dense_residual",
            "It stands beside routed experts; a layer without them has its dense one as ffn.",
        )

    @property
    def dense(self) -> DenseSpec | None:
        """The dense feed-forward, alone or beside the routed one."""
        return self.ffn if isinstance(self.ffn, DenseSpec) else self.dense_residual

    @property
    def reads(self) -> frozenset[str]:
        """What the layer takes from layers below it besides the residual stream."""
        return frozenset() if self.mixer is None else self.mixer.reads

    @property
    def writes(self) -> frozenset[str]:
        """What the layer gives to layers above it besides the residual stream."""
        return frozenset() if self.mixer is None else self.mixer.writes


@spec
class ModelSpec:
    """A decoder language model.

    vocab: V; width: D; norm: of all layers and of the last hidden state; post_norm: whether what
    mixers and feed-forwards return is normed too, before it is added (Grok-1). residual_multiplier:
    of what is added. Logits are soft_cap(multiplier * (h W + bias)), as far as these are given.
    init_scale: standard deviation of the initial matrices.
    """

    vocab: int
    width: int
    layers: tuple[LayerSpec, ...]
    tie_embeddings: bool = True
    norm: NormSpec = RMSNorm()
    post_norm: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    head_bias: bool = False
    logits_multiplier: float = 1.0
    logits_soft_cap: float | None = None
    init_scale: float = 0.02

    def check(self) -> None:
        check_that(self.vocab >= 2, self, "vocab", "A language model needs at least two tokens.")
        check_that(self.width >= 1, self, "width", "Give the model width D.")
        for field in ("embedding_multiplier", "residual_multiplier", "logits_multiplier"):
            check_that(getattr(self, field) > 0, self, field, "Use 1 for none.")
        cap = self.logits_soft_cap
        check_that(cap is None or cap > 0, self, "logits_soft_cap", "Above 0, or None for none.")
        check_that(self.init_scale > 0, self, "init_scale", "Try 0.02.")
        if missing := self.carried_into(0):
            raise SpecError(
                f"ModelSpec.layers read {', '.join(sorted(missing))} of an earlier layer, but no "
                "layer below them gives it.",
                "Put a layer whose attention has kv = SharedKV() below those with EarlierKV().",
                field="layers",
            )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a routed feed-forward."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.ffn, MoESpec))

    def carried_into(self, layer: int) -> frozenset[str]:
        """What `layer` and those above it read that layers below it wrote."""
        wanted: frozenset[str] = frozenset()
        for above in reversed(self.layers[layer:]):
            wanted = (wanted - above.writes) | above.reads
        return wanted
