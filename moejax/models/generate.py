"""Generation with a donated sequence state: one prefill, then one scan over the new tokens."""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.core import SpecError, check_that, keys, spec
from moejax.models.block import run_length
from moejax.models.decoder import DecoderLM, encode, forward, init_state, project
from moejax.moe import Parallel


@runtime_checkable
class Sampler(Protocol):
    """Next tokens [B] from logits [B, V]."""

    def __call__(self, logits_BxV: Array, key: Array) -> Array: ...


@spec
class Greedy:
    """The most likely token."""

    def __call__(self, logits_BxV: Array, key: Array) -> Array:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)


@spec
class Sample:
    """A draw at `temperature` from the `top_k` likeliest tokens within `top_p` of the mass."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def check(self) -> None:
        check_that(self.temperature > 0, self, "temperature", "Use Greedy() for temperature 0.")
        check_that(self.top_k is None or self.top_k >= 1, self, "top_k", "Keep at least one token.")
        check_that(
            0 < self.top_p <= 1,
            self,
            "top_p",
            "It is a share of probability, above 0 and at most 1.",
        )

    def __call__(self, logits_BxV: Array, key: Array) -> Array:
        logits = logits_BxV / self.temperature
        if self.top_k is not None:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            order = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(
                order, axis=-1
            )
            least = jnp.min(jnp.where(before < self.top_p, order, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate(
    model: DecoderLM,
    prompt_BxS: Array,
    steps: int,
    *,
    sampler: Sampler = Greedy(),
    key: Array | None = None,
    mask_BxS: Array | None = None,
    dtype: Any = jnp.float32,
    parallel: Parallel | None = None,
    after_prompt: DecoderLM | None = None,
) -> Array:
    """`steps` new tokens after each prompt: int32 [B, steps].

    mask_BxS: False marks left padding of shorter prompts. key: required by drawing samplers only.
    parallel: as of `encode`.
    after_prompt: the model that goes on where `model` has read the prompt, such as one that lost
    the neurons which the prompt does not use (GRIFFIN, arXiv:2404.01365). Its mixers and runs are
    those of `model`, whose state it continues; SpecError where they are not.
    """
    if key is None and not isinstance(sampler, Greedy):
        raise SpecError(f"{sampler} draws, but key is None.", "Give jax.random.key(seed).")
    if after_prompt is not None:
        _check_continues(model, after_prompt)
    graphdef, parameters = nnx.split(model)
    B, S = prompt_BxS.shape
    mask_BxS = jnp.ones((B, S), bool) if mask_BxS is None else mask_BxS
    state = init_state(model, B, S + steps, dtype)
    first = jax.random.key(0) if key is None else key
    logits, state = prefill(graphdef, dtype, parallel, parameters, prompt_BxS, mask_BxS, state)
    position_B = jnp.sum(mask_BxS, axis=1, dtype=jnp.int32)
    if after_prompt is not None:
        graphdef, parameters = nnx.split(after_prompt)
    tokens, _ = decode(
        graphdef, sampler, steps, dtype, parallel, parameters, logits, position_B, state, first
    )
    return tokens


def _check_continues(model: DecoderLM, after_prompt: DecoderLM) -> None:
    """Raises SpecError unless the state of one fits the other."""
    mine, its = (
        [(run_length(run), run.spec.mixer) for run in one.runs] for one in (model, after_prompt)
    )
    if mine != its:
        raise SpecError(
            f"after_prompt has runs of {[n for n, _ in its]} layers, the model of "
            f"{[n for n, _ in mine]}, or other mixers.",
            "Continue with a model that differs in feed-forwards alone, alike in equal layers.",
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def prefill(
    graphdef: Any,
    dtype: Any,
    parallel: Parallel | None,
    parameters: Any,
    prompt_BxS: Array,
    mask_BxS: Array,
    state: Any,
) -> tuple[Array, Any]:
    """(logits [B, V] after the prompts, the state that holds them); the given state is donated.

    graphdef, parameters: of `nnx.split(model)`. The head sees the last token of each prompt only.
    """
    model = nnx.merge(graphdef, parameters)
    position_BxS = jnp.maximum(jnp.cumsum(mask_BxS, axis=1) - 1, 0).astype(jnp.int32)
    out = encode(
        model,
        prompt_BxS,
        mask_BxS=mask_BxS,
        positions_BxS=position_BxS,
        state=state,
        dtype=dtype,
        parallel=parallel,
    )
    return project(model, out.hidden_BxSxD[:, -1]), out.state


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=8)
def decode(
    graphdef: Any,
    sampler: Sampler,
    steps: int,
    dtype: Any,
    parallel: Parallel | None,
    parameters: Any,
    logits_BxV: Array,
    position_B: Array,
    state: Any,
    key: Array,
) -> tuple[Array, Any]:
    """(`steps` tokens int32 [B, steps], the state after them); the given state is donated.

    logits_BxV: after what the state holds; position_B: of the first new token of each row.
    """
    model = nnx.merge(graphdef, parameters)

    def step(carry: tuple, index: Array) -> tuple[tuple, Array]:
        logits_BxV, state = carry
        token_B = sampler(logits_BxV, keys.fold(key, index))
        out = forward(
            model,
            token_B[:, None],
            positions_BxS=(position_B + index)[:, None],
            state=state,
            dtype=dtype,
            parallel=parallel,
        )
        return (out.logits_BxSxV[:, 0], out.state), token_B

    indices = jnp.arange(steps, dtype=jnp.int32)
    (_, state), token_SxB = jax.lax.scan(step, (logits_BxV, state), indices)
    return token_SxB.T, state  # returned, so that the donated buffers are used
