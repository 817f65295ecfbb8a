"""Second moments of what matrices are multiplied with: the H = sum of x x^T of GPTQ and its kin."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array
from moejax_kernels.grouped_outer import grouped_outer

from moejax.calibrate.accumulators import Sums, Tokens
from moejax.core import Taps, check_that, spec, taps
from moejax.core.taps import Request
from moejax.models import AttentionSpec, LayerSpec, MLASpec, ModelSpec
from moejax.moe import MoESpec

PER_EXPERT = (taps.EXPERT_INPUT, taps.EXPERT_HIDDEN)
_ALL = {taps.EXPERT_INPUT: taps.FFN_INPUT, taps.EXPERT_HIDDEN: taps.ALL_HIDDEN}


class Weighted(NamedTuple):
    """Rows grouped by expert, and what each counts: x_RxK, weight_R, group_sizes_G."""

    x_RxK: Array
    weight_R: Array
    group_sizes_G: Array


@runtime_checkable
class Rows(Protocol):
    """Which rows of an expert's input or hidden activation count, and how much; a spec."""

    def request(self, tap: str) -> Request: ...

    def groups(self, tap: str, experts: int) -> int:
        """Groups of rows that differ: 1 where every expert sees the same."""
        ...

    def __call__(self, tap: str, found: Taps, tokens: Tokens) -> Weighted: ...


@spec
class Routed:
    """The rows that the router sent to each expert, all alike."""

    def request(self, tap: str) -> Request:
        return frozenset({tap, taps.DISPATCH})

    def groups(self, tap: str, experts: int) -> int:
        return experts

    def __call__(self, tap: str, found: Taps, tokens: Tokens) -> Weighted:
        plan = found[taps.DISPATCH]
        return Weighted(found[tap], plan.valid_R.astype(jnp.float32), plan.group_sizes_E)


@spec
class GateWeighted:
    """The same rows times their gate, so that moments weigh by its square: what reaches the sum."""

    def request(self, tap: str) -> Request:
        return Routed().request(tap)

    def groups(self, tap: str, experts: int) -> int:
        return experts

    def __call__(self, tap: str, found: Taps, tokens: Tokens) -> Weighted:
        rows = Routed()(tap, found, tokens)
        return rows._replace(weight_R=rows.weight_R * jnp.square(found[taps.DISPATCH].gate_R))


@spec
class AllTokens:
    """Every valid token for every expert, whatever the router chose."""

    def request(self, tap: str) -> Request:
        return frozenset({_ALL[tap]})

    def groups(self, tap: str, experts: int) -> int:
        return 1 if tap == taps.EXPERT_INPUT else experts

    def __call__(self, tap: str, found: Taps, tokens: Tokens) -> Weighted:
        x = found[_ALL[tap]]
        T, groups = tokens.mask_T.size, x.size // (tokens.mask_T.size * x.shape[-1])
        weight_R = jnp.tile(tokens.mask_T.astype(jnp.float32), groups)
        return Weighted(x.reshape(groups * T, -1), weight_R, jnp.full(groups, T, jnp.int32))


@spec
class SecondMoments(Sums):
    """Sum of x x^T over tokens: float32 [E, K, K] of stored experts, [1, K, K] for other taps.

    tap: "expert_input" or "expert_hidden" per expert, or any tap that holds a vector per token.
    rows: of the per-expert taps, which count. An expert without rows has zeros.
    """

    tap: str = taps.EXPERT_INPUT
    rows: Rows = Routed()

    def check(self) -> None:
        known = (*PER_EXPERT, *_WIDTHS)
        check_that(self.tap in known, self, "tap", f"Choose one of {', '.join(known)}.")
        check_that(
            self.tap in PER_EXPERT or self.rows == Routed(),
            self,
            "rows",
            f"Only {' and '.join(PER_EXPERT)} have rows to choose from.",
        )

    @property
    def name(self) -> str:
        rows = "" if self.rows == Routed() else f", {self.rows}"
        return f"second_moments({self.tap}{rows})"

    @property
    def request(self) -> Request:
        return self.rows.request(self.tap) if self.tap in PER_EXPERT else frozenset({self.tap})

    def init(self, layer: LayerSpec, model: ModelSpec) -> Any:
        width = _width(self.tap, layer, model)
        if width is None:
            return None
        experts = groups = 1
        if self.tap in PER_EXPERT and isinstance(layer.ffn, MoESpec):
            experts = layer.ffn.stored
            groups = self.rows.groups(self.tap, experts)
        # The second part only says, by its shape, for how many experts the moments hold.
        return jnp.zeros((groups, width, width), jnp.float32), jnp.zeros((experts, 0), jnp.int8)

    def update(self, state: Any, found: Taps, tokens: Tokens) -> Any:
        moments, experts = state
        if self.tap in PER_EXPERT:
            x, weight_R, sizes = self.rows(self.tap, found, tokens)
        else:
            x = found[self.tap].reshape(tokens.mask_T.size, -1)
            weight_R, sizes = tokens.mask_T, jnp.full(1, tokens.mask_T.size, jnp.int32)
        return grouped_outer(x, x, sizes, weight_R=weight_R, into=moments), experts

    def finalize(self, state: Any) -> np.ndarray:
        moments, experts = (np.asarray(part) for part in state)
        return np.broadcast_to(moments, (len(experts), *moments.shape[1:]))


def _width(tap: str, layer: LayerSpec, model: ModelSpec) -> int | None:
    """The width K of a tap in a layer, None where the layer has no such thing."""
    moe = layer.ffn if isinstance(layer.ffn, MoESpec) else None
    if tap in PER_EXPERT:
        return None if moe is None else model.width if tap == taps.EXPERT_INPUT else moe.width
    return _WIDTHS[tap](layer, model)


def _context_width(layer: LayerSpec, model: ModelSpec) -> int | None:
    return None if layer.mixer is None else layer.mixer.context_width


def _filtered_width(layer: LayerSpec, model: ModelSpec) -> int | None:
    filters = isinstance(layer.mixer, AttentionSpec) and layer.mixer.filter is not None
    return model.width if filters else None


def _query_latent_width(layer: LayerSpec, model: ModelSpec) -> int | None:
    return layer.mixer.q_rank if isinstance(layer.mixer, MLASpec) else None


def _kv_latent_width(layer: LayerSpec, model: ModelSpec) -> int | None:
    return layer.mixer.kv_rank if isinstance(layer.mixer, MLASpec) else None


def _hidden_width(layer: LayerSpec, model: ModelSpec) -> int | None:
    return None if layer.dense is None else layer.dense.width


def _shared_width(layer: LayerSpec, model: ModelSpec) -> int | None:
    return (layer.ffn.shared_width or None) if isinstance(layer.ffn, MoESpec) else None


def _ffn_stream(layer: LayerSpec, model: ModelSpec) -> int | None:
    return None if layer.ffn is None else model.width


def _mixer_stream(layer: LayerSpec, model: ModelSpec) -> int | None:
    return None if layer.mixer is None else model.width


_WIDTHS = {
    taps.FFN_INPUT: _ffn_stream,
    taps.FFN_OUTPUT: _ffn_stream,
    taps.FFN_HIDDEN: _hidden_width,
    taps.SHARED_HIDDEN: _shared_width,
    taps.ATTENTION_INPUT: _mixer_stream,
    taps.ATTENTION_CONTEXT: _context_width,
    taps.FILTERED_INPUT: _filtered_width,
    taps.DENSE_INPUT: lambda layer, model: model.width if layer.dense_residual else None,
    taps.QUERY_LATENT: _query_latent_width,
    taps.KV_LATENT: _kv_latent_width,
    taps.BLOCK_INPUT: lambda layer, model: model.width,
    taps.BLOCK_OUTPUT: lambda layer, model: model.width,
}
