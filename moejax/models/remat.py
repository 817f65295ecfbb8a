"""What a backward pass keeps of the forward pass, and what it computes again, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from moejax_kernels.permute import PLACES

from moejax.core import spec
from moejax.moe import COMBINED, DISPATCHED, ROUTING

Policy = Callable[..., Any]


@runtime_checkable
class Remat(Protocol):
    """Chooses by a policy of `jax.checkpoint` what of a layer is kept."""

    def policy(self) -> Policy: ...


@spec
class KeepDispatch:
    """Keeps routing decisions, the rows that reached their experts and those that came back.

    Nothing else of a layer: the backward pass computes it again, but chooses and sorts nothing and
    sends no row to its expert or back a second time. Takes K rows of D twice per token and layer.
    """

    def policy(self) -> Policy:
        """Saves what the routed layer names."""
        return jax.checkpoint_policies.save_only_these_names(ROUTING, PLACES, DISPATCHED, COMBINED)


@spec
class KeepNothing:
    """Keeps the input of each layer alone: least memory, every layer computed twice."""

    def policy(self) -> Policy:
        """Saves nothing."""
        return jax.checkpoint_policies.nothing_saveable
