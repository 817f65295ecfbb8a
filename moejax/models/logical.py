"""The logical axes of a model's parameters, by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from moejax import weights
from moejax.core import compat
from moejax.core.axes import EMBED, HEADS, HIDDEN, VOCAB
from moejax.mesh import MeshLike, Rules
from moejax.models.block import Block
from moejax.moe import BANK_LOGICAL

Axes = tuple[str | None, ...]
_GATED: dict[str, Axes] = {
    "gate": (EMBED, HIDDEN),
    "up": (EMBED, HIDDEN),
    "down": (HIDDEN, EMBED),
}
_ATTENTION: dict[str, Axes] = {
    "q": (EMBED, HEADS),
    "k": (EMBED, HEADS),
    "v": (EMBED, HEADS),
    "o": (HEADS, EMBED),
    "q_bias": (HEADS,),
    "k_bias": (HEADS,),
    "v_bias": (HEADS,),
    "q_down": (EMBED, None),
    "q_up": (None, HEADS),
    "kv_down": (EMBED, None),
    "kv_up": (None, HEADS),
}
_OUTER: dict[str, Axes] = {"embed": (VOCAB, EMBED), "head": (EMBED, VOCAB), "head_bias": (VOCAB,)}
_PARTS: dict[str, Mapping[str, Axes]] = {
    "attention": _ATTENTION,
    "ffn": _GATED,
    "moe.shared": _GATED,
    "moe.experts": BANK_LOGICAL,
}


def parameter_axes(name: str, ndim: int) -> Axes:
    """The logical axes of a parameter by its name in a block or outside of all, layers not counted.

    Norms, filters and tables lie on every device; so do routers but for their model width, because
    every token needs the scores of all experts.
    """
    part, _, last = name.rpartition(".")
    if part == "moe.router.scores":
        return (EMBED, *(None,) * (ndim - 1)) if ndim == 2 else (None,) * ndim
    axes = _OUTER.get(name) if not part else _PARTS.get(part, {}).get(last)
    return (None,) * ndim if axes is None else axes


def between_uses(block: Block, rules: Rules) -> Callable[[Any, MeshLike], Any]:
    """Constrains the state of one layer to what its products want: whole along `rules.embed`.

    Inside a scan over layers, so that no more than a layer at a time is brought together. Banks of
    experts are left to the routed block.
    """
    names = [(name, axes) for name, _, axes in leaves_with_axes(block, lambda name: name)]

    def constrain(state: Any, mesh: MeshLike) -> Any:
        leaves, tree = jax.tree.flatten(state)
        whole = []
        for leaf, (name, axes) in zip(leaves, names, strict=True):
            if name.startswith("moe.experts."):
                whole.append(leaf)
                continue
            bare = [None if axis == EMBED else axis for axis in axes[-leaf.ndim :]]
            spec = rules.partition(leaf.shape, bare or [], mesh.shape)
            whole.append(jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec)))
        return jax.tree.unflatten(tree, whole)

    return constrain


def leaves_with_axes(
    module: nnx.Module, local: Callable[[str], str]
) -> Iterator[tuple[str, Any, Axes]]:
    """(name, leaf, logical axes) in the order of the leaves; stacked layers lead with None."""
    _, state = nnx.split(module)
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(str(part) for part in path)
        value = compat.read(variable)
        ndim = len(weights.shape(value))
        axes = parameter_axes(local(name), ndim)
        logical = (*(None,) * (ndim - len(axes)), *axes)
        suffixes = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(value)[0]
        ]
        of_leaf = weights.logical_axes(value, logical)
        for suffix, (leaf, array) in zip(suffixes, weights.flatten(value).items(), strict=True):
            yield name + suffix, array, of_leaf[leaf]
