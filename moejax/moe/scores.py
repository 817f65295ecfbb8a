"""Scores: the router logits of tokens, always in float32."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax import weights
from moejax.core import SpecError, check_that, spec
from moejax.core.axes import EMBED, EXPERT
from moejax.moe.routing import RouterContext

HIDDEN = "router_hidden"  # H, the inner width of a two-layer router
NODES = "router_nodes"  # groups of experts, and the place within a group
DEVICES = "router_devices"


@runtime_checkable
class Scores(Protocol):
    """Router logits of tokens; owns its parameters' shapes, holds none itself.

    axes: the logical axes of each parameter. Where experts are selected, every axis EXPERT is.
    """

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]: ...

    def axes(self) -> dict[str, tuple[str, ...]]: ...

    def __call__(
        self, parameters: dict[str, Any], x_TxD: Array, context: RouterContext
    ) -> Array: ...


@spec
class LinearScores:
    """logits = x W, plus b if `bias` (arXiv:1701.06538, without the noise).

    With the bias: gpt-oss and Skywork-MoE (arXiv:2406.06563, equation 6).
    """

    bias: bool = False

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]:
        kernel = {"kernel": _draw(key, (width, experts), scale)}
        return kernel | ({"bias": jnp.zeros(experts, jnp.float32)} if self.bias else {})

    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"kernel": (EMBED, EXPERT)} | ({"bias": (EXPERT,)} if self.bias else {})

    def __call__(self, parameters: dict[str, Any], x_TxD: Array, context: RouterContext) -> Array:
        logits_TxE = _times(x_TxD, parameters["kernel"])
        return logits_TxE + parameters["bias"].astype(jnp.float32) if self.bias else logits_TxE


@spec
class TanhScores:
    """logits = tanh(x W_1) W_2, W_1 [D, hidden] under the name `hidden`, W_2 [hidden, E] `kernel`.

    LLaMA-MoE's default gate (arXiv:2406.16554; hidden = E), Skywork-MoE's released one (8 E).
    """

    hidden: int

    def check(self) -> None:
        check_that(self.hidden >= 1, self, "hidden", "The number of experts is usual.")

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]:
        first, second = jax.random.split(key)
        return {
            "hidden": _draw(first, (width, self.hidden), scale),
            "kernel": _draw(second, (self.hidden, experts), scale),
        }

    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"hidden": (EMBED, HIDDEN), "kernel": (HIDDEN, EXPERT)}

    def __call__(self, parameters: dict[str, Any], x_TxD: Array, context: RouterContext) -> Array:
        return _times(jnp.tanh(_times(x_TxD, parameters["hidden"])), parameters["kernel"])


@spec
class AttentionScores:
    """logits_i = sum_j softmax_j(q_i k_j) v_j with q, k, v = x W_q, x W_k, x W_v, each [E].

    The attention router of Yuan 2.0-M32 (arXiv:2405.17976): experts attend to experts. Every
    expert's logit depends on all experts, so dropping one changes the logits of the rest.
    """

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]:
        keys = zip(self.axes(), jax.random.split(key, 3), strict=True)
        return {name: _draw(each, (width, experts), scale) for name, each in keys}

    def axes(self) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(("query", "key", "value"), (EMBED, EXPERT))

    def __call__(self, parameters: dict[str, Any], x_TxD: Array, context: RouterContext) -> Array:
        q_TxE, k_TxE, v_TxE = (_times(x_TxD, parameters[name]) for name in self.axes())
        attention_TxExE = jax.nn.softmax(q_TxE[:, :, None] * k_TxE[:, None, :], axis=-1)
        return jnp.sum(attention_TxExE * v_TxE[:, None, :], axis=-1)


@spec
class StandardisedScores:
    """deviation * (z - mean z) / std z of other scores z, over the experts of each token.

    Skywork-MoE's gating logit normalisation (arXiv:2406.06563, equations 7 and 8; `deviation` is
    its lambda). std divides by E - correction: the release's torch.std has correction 1.
    """

    scores: Scores = LinearScores()
    deviation: float = 1.0
    correction: int = 1

    def check(self) -> None:
        check_that(self.deviation > 0, self, "deviation", "1.0 is Skywork-MoE's.")
        check_that(self.correction in (0, 1), self, "correction", "Give 0 or 1.")

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]:
        return self.scores.init(width, experts, scale, key)

    def axes(self) -> dict[str, tuple[str, ...]]:
        return self.scores.axes()

    def __call__(self, parameters: dict[str, Any], x_TxD: Array, context: RouterContext) -> Array:
        z_TxE = self.scores(parameters, x_TxD, context)
        z_TxE = z_TxE - jnp.mean(z_TxE, axis=-1, keepdims=True)
        square_Tx1 = jnp.sum(z_TxE**2, axis=-1, keepdims=True) / (z_TxE.shape[-1] - self.correction)
        # Equal logits (a router that starts at zero) stay zero, with a finite gradient.
        spread_Tx1 = square_Tx1 > 0
        return jnp.where(
            spread_Tx1,
            self.deviation * z_TxE * jax.lax.rsqrt(jnp.where(spread_Tx1, square_Tx1, 1.0)),
            0.0,
        )


@spec
class BiLevelScores:
    """logits_(i, j) = log softmax(x W)_i + log softmax(x V)_j: first a node, then a device in it.

    SMILE's two routers (arXiv:2212.05191): the softmax of these logits is p_i q_j, and its largest
    entry the pair of largest p and q, whose gate it is with TopK(k=1) and SoftmaxGates().
    Expert i * E / nodes + j; W [D, nodes] under the name `node`, V [D, E / nodes] under `device`.
    No expert has a column of its own, so that none can be dropped or moved.
    """

    nodes: int

    def check(self) -> None:
        check_that(self.nodes >= 1, self, "nodes", "Give the groups that experts lie in.")

    def init(self, width: int, experts: int, scale: float, key: Array) -> dict[str, Array]:
        if experts % self.nodes:
            raise SpecError(
                f"BiLevelScores.nodes = {self.nodes} does not divide the {experts} experts.",
                "Choose a divisor.",
                field="nodes",
            )
        first, second = jax.random.split(key)
        return {
            "node": _draw(first, (width, self.nodes), scale),
            "device": _draw(second, (width, experts // self.nodes), scale),
        }

    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"node": (EMBED, NODES), "device": (EMBED, DEVICES)}

    def __call__(self, parameters: dict[str, Any], x_TxD: Array, context: RouterContext) -> Array:
        node_TxI = jax.nn.log_softmax(_times(x_TxD, parameters["node"]), axis=-1)
        device_TxJ = jax.nn.log_softmax(_times(x_TxD, parameters["device"]), axis=-1)
        return (node_TxI[:, :, None] + device_TxJ[:, None, :]).reshape(x_TxD.shape[0], -1)


def _draw(key: Array, shape: tuple[int, ...], scale: float) -> Array:
    return scale * jax.random.truncated_normal(key, -3, 3, shape)


def _times(x_TxK: Array, kernel_KxN: Any) -> Array:
    return jnp.dot(
        x_TxK.astype(jnp.float32),
        weights.materialize(kernel_KxN, jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
