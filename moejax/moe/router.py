"""Routers: scores + selector + gate weights, three specs that combine freely.

| scores | selector | gates | models |
| Linear | TopK | SoftmaxGates() | OLMoE, Qwen1.5-MoE, Qwen2-57B, DeepSeekMoE, OpenMoE, Grok-1; |
| | | | Switch and Hunyuan-Large (k = 1) |
| Linear | TopK | SoftmaxGates(renormalise=True) | Mixtral, Qwen3-MoE, Arctic, Hunyuan-A13B |
| Linear | TopK | PNormGates(order) | DBRX (order 1) |
| Linear | TopK | ChosenSoftmaxGates() | JetMoE, GraniteMoE; gpt-oss (scores with a bias) |
| Attention | TopK | ChosenSoftmaxGates() | Yuan 2.0-M32 |
| Tanh or Linear | TopK | ChosenSoftmaxGates(scale) | LLaMA-MoE |
| Standardised | TopK | SoftmaxGates(renormalise=True) | Skywork-MoE |
| Linear | TopK | SparseMixerGates() | Phi-3.5-MoE, GRIN-MoE |
| Linear | GroupLimited(TopK, best=1) | SoftmaxGates(scale) | DeepSeek-V2 |
| Linear | GroupLimited(BiasedTopK, best=2) | SigmoidGates(scale) | DeepSeek-V3 |
| Linear | BiasedTopK | SigmoidGates(scale) | GLM-4-MoE (one group) |
| BiLevel(nodes) | TopK(1) | SoftmaxGates() | SMILE |
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax import weights
from moejax.core import SpecError, compat, spec
from moejax.core.axes import EXPERT
from moejax.moe.gates import Gates
from moejax.moe.routing import ROUTING, RouterContext, Routing
from moejax.moe.scores import LinearScores, Scores
from moejax.moe.selectors import Selector


class RouterState(nnx.Variable):
    """What a router remembers between steps without a gradient (arXiv:2408.15664's bias, ...)."""


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
        expert_TxK = checkpoint_name(expert_TxK, ROUTING)
        gate_TxK = self.spec.gates.weigh(logits_TxE, probabilities_TxE, expert_TxK)
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

    def take(self, index: Array) -> None:
        """Leaves only the experts `index`, which may be traced: their scores and their state.

        Raises SpecError where the scores hold nothing that is an expert's own.
        """
        axes = self.spec.scores.axes()
        if not any(EXPERT in names for names in axes.values()):
            raise SpecError(
                f"{type(self.spec.scores).__name__} has no scores of single experts to select.",
                "Keep all experts of such a router, or train it with LinearScores.",
            )
        for name, variable in self.scores.items():
            if EXPERT in axes[name]:
                value = compat.read(variable)
                if isinstance(value, weights.Format):
                    value = value.materialize()
                compat.write(variable, jnp.take(value, index, axis=axes[name].index(EXPERT)))
        for variable in self.selector.values():
            compat.write(variable, jnp.take(compat.read(variable), index, axis=0))


def _with_state(routing: Routing, selector: Selector, state: dict[str, Array]) -> Routing:
    return dataclasses.replace(routing, state=selector.next_state(routing.counts_E(), state))
