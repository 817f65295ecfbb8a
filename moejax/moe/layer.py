"""The routed feed-forward layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.core import SpecError, Taps, check_that, compat, spec, taps
from moejax.core.taps import Request
from moejax.moe.activations import Activation, SiLU
from moejax.moe.dispatch import Dense, Dispatch, Dropless
from moejax.moe.experts import GatedExperts, GatedFFN, draw
from moejax.moe.parallel import COMBINED, DISPATCHED, Parallel, routed
from moejax.moe.router import Router, RouterSpec
from moejax.moe.routing import RouterContext, Routing, SlotMap
from moejax.moe.rules import RoutingRule
from moejax.moe.shared import SharedGate

_OF_ROWS = frozenset(
    {
        taps.DISPATCH,
        taps.EXPERT_INPUT,
        taps.EXPERT_HIDDEN,
        taps.EXPERT_OUTPUT,
        taps.ALL_HIDDEN,
        taps.ALL_OUTPUT,
    }
)


class Fixed(nnx.Variable):
    """A table that is part of the model and never trains: a slot map, a rule's thresholds."""


@spec
class SlotSpec:
    """Stored experts that are not the router's: `stored` of them, up to `copies` per router's."""

    stored: int
    copies: int = 1

    def check(self) -> None:
        for field in ("stored", "copies"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")


@spec
class MoESpec:
    """A routed feed-forward: E router experts of hidden width F, a router, a dispatch.

    shared_width: hidden width of all always-on shared experts (arXiv:2401.06066), 0 for none.
    shared_gate: what weighs their output; None for the plain sum.
    expert_bias: whether gate, up and down of the routed experts have biases (gpt-oss).
    slots: set where stored experts differ from router experts (merged, replicated, reordered).
    rules: what is done to the routing before the dispatch, in order.
    """

    experts: int
    width: int
    router: RouterSpec
    dispatch: Dispatch = Dropless()
    activation: Activation = SiLU()
    shared_width: int = 0
    slots: SlotSpec | None = None
    rules: tuple[RoutingRule, ...] = ()
    shared_gate: SharedGate | None = None
    expert_bias: bool = False

    def check(self) -> None:
        check_that(self.experts >= 1, self, "experts", "A MoE layer needs at least one expert.")
        check_that(self.width >= 1, self, "width", "Give the hidden width of one expert.")
        check_that(self.shared_width >= 0, self, "shared_width", "Use 0 for no shared experts.")
        check_that(
            self.shared_gate is None or self.shared_width > 0,
            self,
            "shared_gate",
            "There are no shared experts to weigh: set shared_width, or leave it None.",
        )
        objection = self.router.selector.objection(self.experts)
        check_that(objection is None, self, "experts", objection or "")

    @property
    def stored(self) -> int:
        return self.experts if self.slots is None else self.slots.stored


class MoELayer(nnx.Module):
    """y = sum_k gate_k expert_k(x), plus shared experts if any (arXiv:1701.06538, eq. 1)."""

    def __init__(self, spec: MoESpec, width: int, scale: float, *, rngs: nnx.Rngs):
        self.spec = spec
        self.router = Router(spec.router, width, spec.experts, scale, rngs=rngs)
        self.experts = GatedExperts(
            spec.stored,
            width,
            spec.width,
            spec.activation,
            scale,
            bias=spec.expert_bias,
            rngs=rngs,
        )
        self.shared = (
            GatedFFN(width, spec.shared_width, spec.activation, scale, rngs=rngs)
            if spec.shared_width
            else None
        )
        self.shared_gate = nnx.Param(draw(rngs, (width, 1), scale)) if spec.shared_gate else None
        self.slots = _spread_slots(spec.slots, spec.experts) if spec.slots else None
        self.rules = nnx.List([rule_tables(rule.init()) for rule in spec.rules])

    def __call__(
        self,
        x_TxD: Array,
        context: RouterContext,
        request: Request,
        parallel: Parallel | None = None,
    ) -> tuple[Array, Routing, Taps]:
        """y_TxD, the routing, taps. parallel: the mesh and the strategy on it; None for one device.

        Raises SpecError where a mesh is to tell what happened to single rows.
        """
        routing = self.router(x_TxD, context)
        for rule, held in zip(self.spec.rules, self.rules, strict=True):
            tables = {name: compat.read(variable) for name, variable in held.items()}
            routing = rule(tables, routing, x_TxD, context)
        expert_A = routing.expert_A
        if self.slots is not None:
            slots = SlotMap(*(compat.read(self.slots[name]) for name in ("slot", "copies")))
            expert_A = slots(routing.expert_A, routing.token_A)
        if parallel is None:
            y_TxD, found = self._on_one_device(x_TxD, routing, expert_A, request)
        else:
            y_TxD, found = self._on_mesh(x_TxD, routing, expert_A, request, parallel)
        if self.shared is not None:
            shared_TxD, hidden_TxF = self.shared_output(x_TxD)
            y_TxD = y_TxD + shared_TxD
            found = found.merged(taps.collect(request, shared_hidden=hidden_TxF))
        return y_TxD, routing, found.merged(taps.collect(request, routing=routing))

    def _on_one_device(
        self, x_TxD: Array, routing: Routing, expert_A: Array, request: Request
    ) -> tuple[Array, Taps]:
        plan = self.spec.dispatch.plan(routing, expert_A, self.spec.stored)
        sent_RxD = checkpoint_name(plan.scatter(x_TxD), DISPATCHED)
        rows_RxD, found = self.experts(sent_RxD, plan.group_sizes_E, request)
        if not request.isdisjoint({taps.ALL_HIDDEN, taps.ALL_OUTPUT}):
            found = found.merged(self._on_all(x_TxD, routing, request))
        seen = taps.collect(request, dispatch=plan, dropped=plan.dropped)
        return plan.gather(checkpoint_name(rows_RxD, COMBINED)), found.merged(seen)

    def _on_mesh(
        self,
        x_TxD: Array,
        routing: Routing,
        expert_A: Array,
        request: Request,
        parallel: Parallel,
    ) -> tuple[Array, Taps]:
        if asked := sorted(request & _OF_ROWS):
            raise SpecError(
                f"taps {', '.join(asked)} are of single rows, which lie on many devices.",
                "Ask for them without a mesh.",
            )
        y_TxD, dropped = routed(
            parallel,
            self.experts,
            self.spec.dispatch,
            x_TxD,
            routing,
            expert_A,
            self.spec.stored,
        )
        return y_TxD, taps.collect(request, dropped=dropped)

    def shared_output(self, x_TxD: Array) -> tuple[Array, Array]:
        """What the shared experts add to a token, weighed, and their hidden_TxF."""
        assert self.shared is not None
        hidden_TxF = self.shared.hidden(x_TxD)
        y_TxD = self.shared.project(hidden_TxF)
        if self.shared_gate is not None and self.spec.shared_gate is not None:
            gate_Tx1 = self.spec.shared_gate(compat.read(self.shared_gate), x_TxD)
            y_TxD = y_TxD * gate_Tx1.astype(y_TxD.dtype)
        return y_TxD, hidden_TxF

    def _on_all(self, x_TxD: Array, routing: Routing, request: Request) -> Taps:
        """Hidden and output of every stored expert on every token."""
        E, T = self.spec.stored, x_TxD.shape[0]
        plan = Dense().plan(routing, jnp.zeros_like(routing.expert_A), E)
        inner = frozenset({taps.EXPERT_HIDDEN, taps.EXPERT_OUTPUT})
        _, found = self.experts(plan.scatter(x_TxD), plan.group_sizes_E, inner)
        hidden_ExTxF = found[taps.EXPERT_HIDDEN].reshape(E, T, -1)
        output_ExTxD = found[taps.EXPERT_OUTPUT].reshape(E, T, -1)
        return taps.collect(request, all_hidden=hidden_ExTxF, all_output=output_ExTxD)


def rule_tables(tables: dict[str, Any]) -> nnx.Dict:
    """A rule's tables as a layer holds them."""
    return nnx.Dict({name: Fixed(value) for name, value in tables.items()})


def _spread_slots(slots: SlotSpec, experts: int) -> nnx.Dict:
    """Router experts dealt over the stored ones in turn: the map before any surgery."""
    first_E = jnp.arange(experts, dtype=jnp.int32) % slots.stored
    slot_ExM = jnp.tile(first_E[:, None], (1, slots.copies))
    return nnx.Dict({"slot": Fixed(slot_ExM), "copies": Fixed(jnp.ones(experts, jnp.int32))})
