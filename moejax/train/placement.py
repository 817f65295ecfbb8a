"""A training state on a mesh: where its parts lie, how it begins, what feeds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.data import Batch, Batches
from moejax.mesh import batch_axes, batch_sharding
from moejax.mesh.rows import rows_here, whole_batch
from moejax.models import DecoderLM, ModelSpec, Structure, abstract_model, leaf_shardings, partition
from moejax.moe import Parallel
from moejax.train.optimizer import Optimizer
from moejax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a training run lies on a mesh. state: a TrainState of shardings, a leaf for a leaf."""

    parallel: Parallel
    state: TrainState

    @property
    def platform(self) -> str:
        """What the devices are: cpu, gpu or tpu."""
        mesh = self.parallel.mesh
        return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()

    def parts(self, rows: int) -> int:
        """How many parts of a batch there are, each on devices of its own."""
        sizes = self.parallel.mesh.shape
        return math.prod(sizes[axis] for axis in batch_axes(rows, sizes))

    def of_parts(self, rows: int) -> NamedSharding:
        """Of an array [micro-batches, rows, ...]: each of them is cut over the whole mesh."""
        return NamedSharding(
            self.parallel.mesh, P(None, batch_axes(rows, self.parallel.mesh.shape) or None)
        )

    @property
    def everywhere(self) -> NamedSharding:
        """Of a value that all devices hold."""
        return NamedSharding(self.parallel.mesh, P())


def outline_on_mesh(
    spec: ModelSpec,
    optimizer: Optimizer,
    steps: int,
    parallel: Parallel,
    trains: Callable[[str], bool] = lambda name: True,
) -> tuple[Structure, TrainState, Placement]:
    """Structure and state before the first step as ShapeDtypeStructs with their shardings.

    No device has to exist: a topology's mesh will do, to compile for it.
    Raises SpecError where the mesh does not fit the model.
    """
    outline = abstract_model(spec)
    structure, trainable, frozen = partition(outline, trains)
    rule = optimizer.transformation(steps)
    shapes = TrainState(
        step=cast(Any, jax.ShapeDtypeStruct((), jnp.int32)),
        trainable=trainable,
        frozen=frozen,
        optimizer=jax.eval_shape(rule.init, trainable),
    )
    where = leaf_shardings(outline, parallel.mesh, parallel.rules)
    everywhere = NamedSharding(parallel.mesh, P())
    trained = {name: where[name] for name in trainable}
    shardings = TrainState(
        step=cast(Any, everywhere),
        trainable=cast(Any, trained),
        frozen=cast(Any, {name: where[name] for name in frozen}),
        # Moments lie where the parameters lie that they are of.
        optimizer=optax.tree.map_params(
            rule,
            lambda _, sharding: sharding,
            shapes.optimizer,
            trained,
            transform_non_params=lambda _: everywhere,
        ),
    )
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return structure, placed, Placement(parallel, shardings)


def start_on_mesh(
    spec: ModelSpec,
    seed: int,
    optimizer: Optimizer,
    steps: int,
    parallel: Parallel,
    trains: Callable[[str], bool] = lambda name: True,
) -> tuple[Structure, TrainState, Placement]:
    """A new model and its optimizer, drawn where they lie: no device ever holds them whole.

    The draws are those of `DecoderLM(spec, rngs=nnx.Rngs(seed))` on every mesh.
    Raises SpecError where the mesh does not fit the model.
    """
    structure, _, placement = outline_on_mesh(spec, optimizer, steps, parallel, trains)
    rule = optimizer.transformation(steps)

    def begin() -> TrainState:
        _, trainable, frozen = partition(DecoderLM(spec, rngs=nnx.Rngs(seed)), trains)
        return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, rule.init(trainable))

    return structure, jax.jit(begin, out_shardings=placement.state)(), placement


class MeshBatches:
    """Batches whose rows lie on the devices that work on them; each process reads its own.

    make: rows read here -> `Batches` of `batch` rows, of which it reads those.
    """

    def __init__(self, make: Callable[[Any], Batches], batch: int, parallel: Parallel):
        self._sharding, self._batch = batch_sharding(parallel.mesh, batch), batch
        self._here = rows_here(self._sharding, batch)
        self._batches = make(self._here)

    def __next__(self) -> Batch:
        """tokens_BxS1: all rows, each where it is worked on; group_B: of the rows read here."""
        read = next(self._batches)
        tokens_BxS1 = whole_batch(read.tokens_BxS1, self._here, self._sharding, self._batch)
        return Batch(cast(Any, tokens_BxS1), read.group_B)

    def state(self) -> dict[str, Any]:
        """The position before the next batch, the same on every mesh and in every process."""
        return self._batches.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `state` gave, here or on another mesh."""
        self._batches.restore(state)

    def epochs(self) -> dict[str, float]:
        """How often each group was read so far."""
        return self._batches.epochs()
