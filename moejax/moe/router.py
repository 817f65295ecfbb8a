"""Routers: scores + selector + gate weights, three specs that combine freely.

| rule | selector | gates | models |
| softmax, then top-k | TopK | SoftmaxGates() | OLMoE, Qwen1.5-MoE, DeepSeekMoE, Switch (k = 1) |
| the same, renormalised | TopK | SoftmaxGates(renormalise=True) | Mixtral, Qwen3-MoE, DBRX |
| top-k, then softmax | TopK | ChosenSoftmaxGates() | JetMoE, GraniteMoE, gpt-oss |
| sigmoid with bias | BiasedTopK | SigmoidGates() | DeepSeek-V3, GLM-4-MoE |
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax import weights
from moejax.core import check_that, compat, spec
from moejax.core.axes import EMBED, EXPERT
from moejax.moe.routing import RouterContext, Routing


class RouterState(nnx.Variable):
    """What a router remembers between steps without a gradient (arXiv:2408.15664's bias, ...)."""


@runtime_checkable
class Scores(Protocol):
    """Router logits of tokens; owns its parameters' shapes, holds none itself."""

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]: ...

    def axes(self) -> dict[str, tuple[str, ...]]: ...

    def __call__(
        self, parameters: dict[str, Array], x_TxD: Array, context: RouterContext
    ) -> Array: ...


@runtime_checkable
class Selector(Protocol):
    """Chooses experts by probability: `choose(...) -> expert_TxK`, and the next state."""

    def init(self, experts: int) -> dict[str, Array]: ...

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array: ...

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]: ...


@runtime_checkable
class Gates(Protocol):
    """Gate weights: `probabilities` for selection and losses, `weigh` for the chosen experts."""

    def probabilities(self, logits_TxE: Array) -> Array: ...

    def weigh(self, logits_TxK: Array, probabilities_TxK: Array) -> Array: ...


@spec
class LinearScores:
    """logits = x W, in float32 (arXiv:1701.06538, without the noise)."""

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]:
        return {"kernel": scale * jax.random.truncated_normal(key, -3, 3, (width, experts))}

    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"kernel": (EMBED, EXPERT)}

    def __call__(self, parameters: dict[str, Array], x_TxD: Array, context: RouterContext) -> Array:
        kernel_DxE = weights.materialize(parameters["kernel"], jnp.float32)
        return jnp.dot(x_TxD.astype(jnp.float32), kernel_DxE, precision=jax.lax.Precision.HIGHEST)


@spec
class TopK:
    """The k experts of highest probability."""

    k: int

    def check(self) -> None:
        check_that(self.k >= 1, self, "k", "Choose at least one expert per token.")

    def init(self, experts: int) -> dict[str, Array]:
        return {}

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return jax.lax.top_k(probabilities_TxE, self.k)[1].astype(jnp.int32)

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]:
        return state


@spec
class BiasedTopK:
    """Top-k of probability + bias; the bias chases balance without a gradient (arXiv:2408.15664).

    After each step b_i += rate * sign(mean count - count_i). Gate weights never see the bias.
    """

    k: int
    rate: float = 1e-3

    def check(self) -> None:
        check_that(self.k >= 1, self, "k", "Choose at least one expert per token.")
        check_that(self.rate >= 0, self, "rate", "Use 0 to freeze the bias.")

    def init(self, experts: int) -> dict[str, Array]:
        return {"bias": jnp.zeros(experts, jnp.float32)}

    def choose(self, probabilities_TxE: Array, state: dict[str, Array]) -> Array:
        return jax.lax.top_k(probabilities_TxE + state["bias"], self.k)[1].astype(jnp.int32)

    def next_state(self, counts_E: Array, state: dict[str, Array]) -> dict[str, Array]:
        return {"bias": state["bias"] + self.rate * jnp.sign(jnp.mean(counts_E) - counts_E)}


@spec
class SoftmaxGates:
    """p = softmax(l); g = scale * p of the chosen, divided by their sum if `renormalise`."""

    renormalise: bool = False
    scale: float = 1.0

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.softmax(logits_TxE, axis=-1)

    def weigh(self, logits_TxK: Array, probabilities_TxK: Array) -> Array:
        total = jnp.sum(probabilities_TxK, axis=-1, keepdims=True) if self.renormalise else 1.0
        return self.scale * probabilities_TxK / total


@spec
class ChosenSoftmaxGates:
    """g = softmax over the logits of the chosen experts alone."""

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.softmax(logits_TxE, axis=-1)

    def weigh(self, logits_TxK: Array, probabilities_TxK: Array) -> Array:
        return jax.nn.softmax(logits_TxK, axis=-1)


@spec
class SigmoidGates:
    """s = sigmoid(l); g = scale * s of the chosen, divided by their sum if `renormalise`.

    arXiv:2412.19437, equations 12 to 16.
    """

    renormalise: bool = True
    scale: float = 1.0

    def probabilities(self, logits_TxE: Array) -> Array:
        return jax.nn.sigmoid(logits_TxE)

    def weigh(self, logits_TxK: Array, probabilities_TxK: Array) -> Array:
        total = (
            jnp.sum(probabilities_TxK, axis=-1, keepdims=True) + 1e-20 if self.renormalise else 1.0
        )
        return self.scale * probabilities_TxK / total


@spec
class RouterSpec:
    """A router: how it scores, selects and weighs."""

    selector: Selector
    gates: Gates
    scores: Scores = LinearScores()


class Router(nnx.Module):
    """Tokens -> Routing. Holds the parameters of its scores and the state of its selector."""

    def __init__(self, spec: RouterSpec, width: int, experts: int, scale: float, *, rngs: nnx.Rngs):
        self.spec = spec
        drawn = spec.scores.init(width, experts, scale, rngs.params())
        self.scores = nnx.Dict({name: nnx.Param(value) for name, value in drawn.items()})
        state = spec.selector.init(experts)
        self.selector = nnx.Dict({name: RouterState(value) for name, value in state.items()})

    def __call__(self, x_TxD: Array, context: RouterContext) -> Routing:
        parameters = {name: compat.read(p) for name, p in self.scores.items()}
        state = {name: compat.read(s) for name, s in self.selector.items()}
        logits_TxE = self.spec.scores(parameters, x_TxD, context)
        probabilities_TxE = self.spec.gates.probabilities(logits_TxE)
        expert_TxK = self.spec.selector.choose(jax.lax.stop_gradient(probabilities_TxE), state)
        gate_TxK = self.spec.gates.weigh(
            jnp.take_along_axis(logits_TxE, expert_TxK, axis=-1),
            jnp.take_along_axis(probabilities_TxE, expert_TxK, axis=-1),
        )
        T, K = expert_TxK.shape
        valid_T = jnp.ones(T, bool) if context.mask_T is None else context.mask_T
        routing = Routing(
            token_A=jnp.repeat(jnp.arange(T, dtype=jnp.int32), K),
            expert_A=expert_TxK.reshape(-1),
            gate_A=gate_TxK.reshape(-1),
            valid_A=jnp.repeat(valid_T, K),
            logits_TxE=logits_TxE,
            probabilities_TxE=probabilities_TxE,
            per_token=K,
        )
        return (
            _with_state(routing, self.spec.selector, state) if state and context.train else routing
        )


def _with_state(routing: Routing, selector: Selector, state: dict[str, Array]) -> Routing:
    return dataclasses.replace(routing, state=selector.next_state(routing.counts_E(), state))
