"""The few JAX and Flax APIs that move between releases, in one place."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def read(variable: nnx.Variable) -> Any:
    """The value of an NNX variable, array or format, without a copy."""
    return variable.get_value()


def write(variable: nnx.Variable, value: Any) -> None:
    """Puts `value` into an NNX variable."""
    variable.set_value(value)


def copied(module: M) -> M:
    """A module of its own that holds the same arrays; `nnx.merge` alone shares the variables."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
