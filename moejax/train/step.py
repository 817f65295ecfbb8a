"""One training step as a pure function on leaves: loss, gradient, update, router state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from moejax.core import SpecError, keys
from moejax.models import DecoderLM, ModelSpec, Remat, Structure, combine, encode, partition
from moejax.models.block import run_length
from moejax.models.partition import Leaves
from moejax.moe import RouterLoss
from moejax.train.objective import best_chunk
from moejax.train.objectives import CrossEntropy, Objective, Passed, check_objective
from moejax.train.optimizer import Optimizer, is_matrix
from moejax.train.placement import Placement
from moejax.train.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step says, on the device until someone asks.

    loss: mean nats per token. objective: loss and router losses. router_losses: by class name.
    counts: per MoE layer, assignments of each router expert, float32 [E].
    """

    loss: Array
    objective: Array
    gradient_norm: Array
    learning_rate: Array
    router_losses: dict[str, Array]
    counts: tuple[Array, ...]


Step = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]


def train_step(
    structure: Structure,
    optimizer: Optimizer,
    steps: int,
    *,
    losses: Sequence[RouterLoss] = (),
    accumulate: int = 1,
    dtype: Any = jnp.float32,
    seed: int = 0,
    remat: Remat | None = None,
    placement: Placement | None = None,
    objective: Objective = CrossEntropy(),
    teacher: DecoderLM | None = None,
    through: Callable[[Leaves], Leaves] = lambda trainable: trainable,
) -> Step:
    """A jitted `(state, tokens_BxS1) -> (state, metrics)` that donates its state.

    tokens_BxS1: int32, inputs and the token after each. steps: of the whole run, for the schedule.
    accumulate: micro-batches that a batch is cut into; they give the gradient of the whole batch.
    Router losses, router state and capacity see one micro-batch at a time: their values are the
    means over micro-batches, so that a bias rule moves by its rate once per step.
    dtype: of activations and of the matrices in a product; parameters, gradients, routers and
    optimizer state stay float32.
    remat: what the backward pass computes again, None for nothing. placement: where the state lies
    on a mesh, for which the step is compiled; None for one device. A step on a mesh takes and
    gives what one device would, to rounding.
    teacher: a model that stays as it is, for an objective that `teaches`; SpecError where it asks
    one that is not there, or that it cannot be compared with. through: what the forward pass sees
    of the trainable leaves, `straight_through` for codes.
    """
    rule = optimizer.transformation(steps)
    parallel = None if placement is None else placement.parallel
    student_spec = _spec(structure)
    check_objective(objective, student_spec, None if teacher is None else teacher.spec)
    taught = partition(teacher, lambda name: False) if teacher and objective.teaches else None

    def minimised(
        trainable: Leaves,
        frozen: Leaves,
        tokens_BxS1: Array,
        key: Array,
        number: Array,
        known: Leaves | None,
    ) -> tuple[Array, dict[str, Any]]:
        model = combine(structure, in_compute_dtype(through(trainable), dtype), frozen)
        seen_BxS = tokens_BxS1[:, :-1]
        how: dict[str, Any] = {"request": objective.request, "dtype": dtype, "parallel": parallel}
        where = {
            "chunk": best_chunk(placement and placement.platform),
            "parts": 1 if placement is None else placement.parts(seen_BxS.shape[0]),
        }
        encoding = encode(model, seen_BxS, train=True, key=key, remat=remat, **how)
        passed = None
        if taught is not None and known is not None:
            teaching = combine(taught[0], {}, known)
            passed = Passed(teaching, encode(teaching, seen_BxS, **how), **where)
        target_T = tokens_BxS1[:, 1:].reshape(-1)
        loss = objective(Passed(model, encoding, **where), passed, target_T, number)
        routings = tuple(r for r in encoding.routings if r is not None)
        router: dict[str, Array] = {}
        for term in losses if routings else ():
            name = type(term).__name__
            router[name] = router.get(name, 0.0) + term(routings, None)
        seen = {
            "loss": loss,
            "router": router,
            "counts": tuple(r.counts_E() for r in routings),
            "state": router_state(model, encoding.routings),
        }
        return jnp.asarray(loss) + sum(router.values()), seen

    gradient = jax.value_and_grad(minimised, has_aux=True)

    def step(
        state: TrainState, tokens_BxS1: Array, known: Leaves | None = None
    ) -> tuple[TrainState, StepMetrics]:
        key = keys.fold(jax.random.key(seed), state.step)
        parts = _micro_batches(tokens_BxS1, accumulate)
        if placement is not None:
            parts = jax.lax.with_sharding_constraint(parts, placement.of_parts(parts.shape[1]))

        def one(index: Array) -> tuple[tuple[Array, dict], Leaves]:
            drawn = keys.fold(key, index)
            leaves = (state.trainable, state.frozen)
            found, slopes = gradient(*leaves, parts[index], drawn, state.step, known)
            if placement is not None:  # cut as the parameters are, before they are added up
                slopes = jax.lax.with_sharding_constraint(slopes, placement.state.trainable)
            return found, slopes

        total = _sum(one, accumulate)
        (value, seen), gradients = jax.tree.map(lambda a: a / accumulate, total)
        counts = total[0][1]["counts"]
        updates, memory = rule.update(gradients, state.optimizer, state.trainable)
        metrics = StepMetrics(
            loss=seen["loss"],
            objective=value,
            gradient_norm=optax.tree.norm(gradients),
            learning_rate=optimizer.learning_rate(state.step, steps),
            router_losses=seen["router"],
            counts=counts,
        )
        after = TrainState(
            step=state.step + 1,
            trainable=cast(Leaves, optax.apply_updates(state.trainable, updates)),
            frozen={**state.frozen, **seen["state"]},
            optimizer=memory,
        )
        return after, metrics

    where = {}
    if placement is not None:
        where["out_shardings"] = (placement.state, placement.everywhere)
    jitted = jax.jit(step, donate_argnums=0, **where)
    return jitted if taught is None else functools.partial(jitted, known=taught[2])


def _spec(structure: Structure) -> ModelSpec:
    """What model the leaves of a structure are of."""
    leaves = [jax.ShapeDtypeStruct((), jnp.float32)] * len(structure.names)
    return nnx.merge(structure.graphdef, jax.tree.unflatten(structure.tree, leaves)).spec


def in_compute_dtype(trainable: Leaves, dtype: Any) -> Leaves:
    """Matrices in `dtype`; norms and routers stay as they are."""
    return {
        name: leaf.astype(dtype) if is_matrix(name, leaf) and ".router." not in name else leaf
        for name, leaf in trainable.items()
    }


def router_state(model: DecoderLM, routings: Sequence[Any]) -> Leaves:
    """The new state of all routers that have one, under the names of `models.partition`."""
    leaves: Leaves = {}
    first = 0
    for index, run in enumerate(model.runs):
        layers = routings[first : first + run_length(run)]
        first += len(layers)
        if layers[0] is not None and layers[0].state:
            for name in layers[0].state:
                path = f"runs.{index}.moe.router.selector.{name}"
                leaves[path] = jnp.stack([routing.state[name] for routing in layers])
    return leaves


def _micro_batches(tokens_BxS1: Array, accumulate: int) -> Array:
    """[accumulate, B / accumulate, S + 1]"""
    B, S1 = tokens_BxS1.shape
    if B % accumulate:
        raise SpecError(
            f"a batch of {B} rows cannot be cut into {accumulate} micro-batches.",
            "Choose accumulate so that it divides the batch.",
            field="accumulate",
        )
    return tokens_BxS1.reshape(accumulate, B // accumulate, S1)


def _sum(function: Callable[[Array], Any], count: int) -> Any:
    """function(0) + ... + function(count - 1), one at a time."""
    if count == 1:
        return function(jnp.int32(0))

    def add(total: Any, index: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(index)), None

    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, jnp.int32(0))
    )
    return jax.lax.scan(add, zero, jnp.arange(count, dtype=jnp.int32))[0]
