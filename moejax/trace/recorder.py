"""From a model's routings to rows of a trace, without making the device wait."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.models import DecoderLM, encode
from moejax.moe import Routing
from moejax.trace.layout import NOBODY, PREFILL, TraceLayout, TraceRows
from moejax.trace.writer import TraceWriter


def chosen(routings: Sequence[Routing | None], choices: int) -> tuple[Array, Array]:
    """expert_TxLxK int16 and gate_TxLxK float32 of the MoE layers among `routings`; traceable.

    In the order of the assignment list where every token has K of them, else by falling gate
    weight; choices that a rule took back, and padding, are -1.
    """
    found = [_chosen(routing, choices) for routing in routings if routing is not None]
    expert, gate = zip(*found, strict=True)
    return jnp.stack(expert, axis=1), jnp.stack(gate, axis=1)


def _chosen(routing: Routing, choices: int) -> tuple[Array, Array]:
    if routing.per_token is not None:
        shape = (routing.tokens, routing.per_token)
        valid = routing.valid_A.reshape(shape)
        expert = jnp.where(valid, routing.expert_A.reshape(shape), NOBODY)
        gate = jnp.where(valid, routing.gate_A.reshape(shape), 0.0)
    else:
        at = (routing.token_A, routing.expert_A)
        empty_TxE = jnp.full((routing.tokens, routing.experts), -jnp.inf)
        gate_TxE = empty_TxE.at[at].max(jnp.where(routing.valid_A, routing.gate_A, -jnp.inf))
        gate, expert = jax.lax.top_k(gate_TxE, min(choices, routing.experts))
        expert = jnp.where(gate == -jnp.inf, NOBODY, expert)
        gate = jnp.where(gate == -jnp.inf, 0.0, gate)
    wide = ((0, 0), (0, choices - gate.shape[1]))
    expert = jnp.pad(expert.astype(jnp.int16), wide, constant_values=NOBODY)
    return expert, jnp.pad(gate.astype(jnp.float32), wide)


def layout_of(model: DecoderLM, sha256: str, groups: Sequence[str]) -> TraceLayout:
    """The layout of a trace of this model. sha256: of its manifest.

    Raises DataError if it has no MoE layer.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    routings = jax.eval_shape(lambda tokens: encode(model, tokens).routings, tokens)
    found = [routing for routing in routings if routing is not None]
    layout = TraceLayout(
        model=sha256,
        layers=model.spec.moe_layers,
        experts=tuple(routing.experts for routing in found),
        choices=max((routing.per_token or routing.experts for routing in found), default=0),
        groups=tuple(groups),
    )
    layout.check()
    return layout


class TraceRecorder:
    """Takes what `chosen` gave for one batch of texts after another, and writes it one batch late.

    The device has long finished a batch when its rows are fetched, so that recording costs a copy
    and no wait. `close`, or the end of a `with` block, writes the last one.
    """

    def __init__(self, writer: TraceWriter):
        self._writer = writer
        self._requests = 0
        self._held: tuple[tuple[Array, Array], np.ndarray, list[np.ndarray]] | None = None

    @property
    def layout(self) -> TraceLayout:
        return self._writer.layout

    def add(
        self, tokens_BxS: np.ndarray, mask_BxS: np.ndarray, group: str, found: tuple[Array, Array]
    ) -> None:
        """A batch of texts that the model read at once; each row with a token is a request.

        found: of `chosen`, tokens in the order of the flattened batch. Rows outside the mask are
        left out.
        """
        B, S = tokens_BxS.shape
        mask_T = np.asarray(mask_BxS).reshape(-1)
        kept_B = np.asarray(mask_BxS).any(1)
        request_B = self._requests + np.cumsum(kept_B) - 1
        self._requests += int(kept_B.sum())
        tokens = int(mask_T.sum())
        head = [
            np.repeat(request_B, S)[mask_T],
            np.zeros(tokens, np.int32),  # step: a text is read at once
            np.tile(np.arange(S), B)[mask_T],
            np.asarray(tokens_BxS).reshape(-1)[mask_T],
            np.full(tokens, self.layout.groups.index(group)),
            np.full(tokens, PREFILL),
        ]
        for array in found:
            array.copy_to_host_async()
        self._write_held()
        self._held = found, mask_T, head

    def close(self) -> None:
        """Writes what is held, and flushes."""
        self._write_held()
        self._writer.flush()

    def __enter__(self) -> TraceRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _write_held(self) -> None:
        if self._held is None:
            return
        (expert, gate), mask_T, head = self._held
        self._held = None
        chosen_T = np.asarray(expert)[mask_T], np.asarray(gate)[mask_T]
        self._writer.append(TraceRows._make([*head, *chosen_T]))
