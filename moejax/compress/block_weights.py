"""The weights of one block by name, and the block with others in their place."""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx

from moejax.compress.passes import Weight
from moejax.compress.patterns import BIAS
from moejax.core import compat
from moejax.models import Block

EXPERTS = "moe.experts."


def block_weights(block: Block) -> dict[str, Weight]:
    """Name within the layer ("moe.experts.gate") -> weight."""
    return {name: compat.read(variable) for name, variable in _variables(block).items()}


def with_block_weights(block: Block, changed: Mapping[str, Weight]) -> Block:
    """A block with the weights `changed`; the given block stays as it is."""
    edited = compat.copied(block)
    variables = _variables(edited)
    for name, value in changed.items():
        compat.write(variables[name], value)
    return edited


def expert_matrices(block: Block) -> tuple[str, ...]:
    """Names of the expert matrices of a block, [E, K, N] each; their biases are not among them."""
    names = (name for name in _variables(block) if name.startswith(EXPERTS))
    return tuple(name for name in names if not name.endswith(BIAS))


def _variables(block: Block) -> dict[str, nnx.Variable]:
    found = nnx.iter_graph(block)
    named = {
        ".".join(map(str, path)): node for path, node in found if isinstance(node, nnx.Variable)
    }
    return dict(sorted(named.items()))
