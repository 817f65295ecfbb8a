"""The routed block on a mesh: one shard_map, outside of which there is no sort and no gather.

Routers, rules and slots stand before it and see all tokens at once: their statistics, states and
draws are those of the global batch whatever the mesh is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from moejax.core import SpecError
from moejax.core.taps import NOTHING
from moejax.mesh import MODEL
from moejax.moe.dispatch import Dispatch
from moejax.moe.experts import GatedExperts
from moejax.moe.parallel.admission import admitted
from moejax.moe.parallel.bank import (
    biases_in,
    brought,
    count,
    cuts,
    device_order,
    one_down_bias,
    only,
    spec_of,
)
from moejax.moe.parallel.strategy import Bank, Choices, Parallel, Sorted
from moejax.moe.routing import Routing


def routed(
    parallel: Parallel,
    experts: GatedExperts,
    dispatch: Dispatch,
    x_TxD: Array,
    routing: Routing,
    expert_A: Array,
    stored: int,
) -> tuple[Array, Array]:
    """y_TxD of the routed experts, and the valid assignments that found no room: int32 [].

    expert_A: stored experts. Raises SpecError where the mesh does not divide the bank, and for
    routings without the same number of experts for every token.
    """
    if routing.per_token is None:
        raise SpecError(
            "a mesh wants the same number of experts for every token.",
            "Use a router that chooses the top k, or run without a mesh.",
        )
    sizes: dict[str, int] = dict(parallel.mesh.shape)
    strategy, T, K = parallel.strategy, x_TxD.shape[0], routing.per_token
    bank_axes = tuple(axis for axis in strategy.bank_axes if sizes[axis] > 1)
    token_axes = tuple(axis for axis in strategy.token_axes if sizes[axis] > 1)
    devices = count(sizes, bank_axes)

    # Where all devices see all tokens their results must be known to be equal: nothing is gathered.
    kept = tuple(sizes) if strategy.token_axes else (MODEL,)
    cut = [only(leaf, kept) for leaf in cuts(experts, parallel)]
    order_E = device_order(experts, devices)
    graphdef, state = nnx.split(biases_in(order_E, experts))
    leaves, tree = jax.tree.flatten(state)

    choices = Choices(
        expert_TxK=_renamed(expert_A, order_E).reshape(T, K),
        gate_TxK=routing.gate_A.reshape(T, K),
        valid_TxK=routing.valid_A.reshape(T, K),
    )
    x_TxD, choices = _filled_up((x_TxD, choices), -T % count(sizes, token_axes))

    def products_of(leaves: list[Any]) -> Sorted:
        module: GatedExperts = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        module = one_down_bias(module) if sizes[MODEL] > 1 else module
        return lambda rows_RxD, group_sizes: module(rows_RxD, group_sizes, NOTHING)[0]

    def block(x_TxD: Array, choices: Choices, leaves: list[Any]) -> tuple[Array, Array]:
        between = tuple(axis for axis in sizes if axis not in (*bank_axes, MODEL))
        here = [brought(leaf, where, between) for leaf, where in zip(leaves, cut, strict=True)]
        bank = Bank(
            local=stored // devices,
            devices=devices,
            axes=bank_axes,
            model=sizes[MODEL],
            products=products_of(here),
        )
        choices, refused = admitted(dispatch, choices, stored, T * K, token_axes)
        y_TxD, dropped = strategy(x_TxD, choices, bank)
        if strategy.sums_model and sizes[MODEL] > 1:
            y_TxD = lax.psum(y_TxD, MODEL)
        return y_TxD, (refused + dropped)[None]

    tokens = P(token_axes or None)
    y_TxD, dropped_N = jax.shard_map(
        block,
        mesh=parallel.mesh,
        in_specs=(tokens, tokens, [spec_of(where) for where in cut]),
        out_specs=(tokens, tokens),
    )(x_TxD, choices, leaves)
    return y_TxD[:T], jnp.sum(dropped_N)


def _renamed(expert_A: Array, order_E: np.ndarray) -> Array:
    """Stored experts as the devices number them."""
    if np.array_equal(order_E, np.arange(order_E.size)):
        return expert_A
    return jnp.asarray(np.argsort(order_E), jnp.int32)[expert_A]


def _filled_up(tree: Any, rows: int) -> Any:
    """Arrays [T, ...] with invalid tokens at the end, so that devices divide them."""
    if rows == 0:
        return tree
    return jax.tree.map(lambda a: jnp.pad(a, ((0, rows), *((0, 0),) * (a.ndim - 1))), tree)
