"""Where the parameters of a model lie on a mesh: shardings by name, and placement."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from moejax.mesh import MeshLike, Rules
from moejax.models.decoder import DecoderLM
from moejax.models.logical import leaves_with_axes


def place(model: DecoderLM, mesh: MeshLike, rules: Rules = Rules()) -> DecoderLM:
    """The model with its arrays where the mesh wants them; an outline gets shardings alone.

    Works on ShapeDtypeStructs with the mesh of a topology, where no device exists: what it returns
    is what `jax.jit(...).lower` wants. Raises SpecError where the mesh does not fit the model.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    where = leaf_shardings(model, mesh, rules)
    placed = [put(leaf, sharding) for leaf, sharding in zip(leaves, where.values(), strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, placed))


def leaf_shardings(
    model: DecoderLM, mesh: MeshLike, rules: Rules = Rules()
) -> dict[str, NamedSharding]:
    """Name as in `partition` -> sharding, for every leaf; the model may be an outline."""
    return {
        name: NamedSharding(mesh, rules.partition(leaf.shape, axes, mesh.shape))
        for name, leaf, axes in leaves_with_axes(model, _in_model)
    }


def _in_model(name: str) -> str:
    """`runs.3.moe.experts.gate` -> `moe.experts.gate`."""
    return name.split(".", 2)[2] if name.startswith("runs.") else name
