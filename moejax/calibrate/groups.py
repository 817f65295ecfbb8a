"""Any statistic once per group of the text: languages, domains."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate.accumulators import Accumulator, Tokens
from moejax.calibrate.samples import LayerInputs
from moejax.core import Taps, check_that, spec
from moejax.core.taps import Request
from moejax.models import LayerSpec, ModelSpec


def group_id(name: str) -> int:
    """What `Tokens.group` holds for a group: the crc32 of its name."""
    return zlib.crc32(name.encode())


@spec
class ByGroup:
    """The statistic `of`, apart for each of `groups`: [groups, *shape of it].

    Text of other groups does not count. A sample has no fixed size and cannot be stacked.
    """

    of: Accumulator
    groups: tuple[str, ...]

    def check(self) -> None:
        distinct = len({group_id(name) for name in self.groups}) == len(self.groups) > 0
        check_that(distinct, self, "groups", "Name at least one group, each once.")
        stacks = not isinstance(self.of, LayerInputs | ByGroup)
        check_that(stacks, self, "of", "Choose a statistic of a fixed shape.")

    @property
    def name(self) -> str:
        return f"{self.of.name} by {', '.join(self.groups)}"

    @property
    def request(self) -> Request:
        return self.of.request

    def init(self, layer: LayerSpec, model: ModelSpec) -> Any:
        one = self.of.init(layer, model)
        if one is None:
            return None
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(self.groups)), one)

    def update(self, state: Any, found: Taps, tokens: Tokens) -> Any:
        known_G = jnp.asarray([group_id(name) for name in self.groups], jnp.uint32) == tokens.group
        index, known = jnp.argmax(known_G), jnp.any(known_G)
        one = jax.tree.map(lambda all_G: all_G[index], state)
        new = self.of.update(one, found, tokens)

        def put(all_G: Any, old: Any, new: Any) -> Any:
            return all_G.at[index].set(jnp.where(known, new, old))

        return jax.tree.map(put, state, one, new)

    def merge(self, a: Any, b: Any) -> Any:
        return jax.vmap(self.of.merge)(a, b)

    def finalize(self, state: Any) -> np.ndarray:
        parts = [jax.tree.map(lambda a, i=i: a[i], state) for i in range(len(self.groups))]
        return np.stack([self.of.finalize(part) for part in parts])
