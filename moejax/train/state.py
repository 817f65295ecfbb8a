"""The state of a training run, and how it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax.models import DecoderLM, Structure, partition
from moejax.models.partition import Leaves
from moejax.train.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes. step: int32 [], steps taken. frozen: codes, tables and router state."""

    step: Array
    trainable: Leaves
    frozen: Leaves
    optimizer: Any


def start(
    model: DecoderLM,
    optimizer: Optimizer,
    steps: int,
    trains: Callable[[str], bool] = lambda name: True,
) -> tuple[Structure, TrainState]:
    """The state before the first step. It takes over the model's arrays: a step donates them."""
    structure, trainable, frozen = partition(model, trains)
    first = jnp.zeros((), jnp.int32)
    return structure, TrainState(
        first, trainable, frozen, optimizer.transformation(steps).init(trainable)
    )
