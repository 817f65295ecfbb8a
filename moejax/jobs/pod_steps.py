"""The steps of a model as programs of shapes alone: training, prefill and decoding on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.compress import Step
from moejax.core import check_that, spec
from moejax.mesh import batch_axes, batch_sharding
from moejax.models import Greedy, KeepNothing, ModelSpec, Remat, abstract_model, init_state, place
from moejax.models.generate import decode, prefill
from moejax.moe import Parallel, RouterLoss
from moejax.train import AdamW, Optimizer, outline_on_mesh, train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Shapes = Any


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A jitted function and its arguments, arrays as shapes that say where they lie.

    held: name -> those of the arguments that stay on the devices. tokens: that one step takes, on
    all devices together. trains: whether it differentiates.
    """

    function: Callable
    arguments: tuple[Any, ...]
    held: dict[str, Shapes]
    tokens: int
    trains: bool


@runtime_checkable
class PodStep(Protocol):
    """A step that can be compiled for a pod."""

    @property
    def name(self) -> str: ...

    @property
    def batch(self) -> int: ...

    def program(self, model: ModelSpec, parallel: Parallel) -> StepProgram:
        """The step on abstract state. SpecError where the mesh does not fit the model."""
        ...


@spec
class PodTrainStep:
    """A training step of `batch` rows of `length` tokens, as `moejax run` takes it.

    accumulate: micro-batches per step. optimizer, losses, compute_dtype, remat: as of `Train`;
    parameters are float32.
    """

    batch: int
    length: int
    accumulate: int = 1
    optimizer: Optimizer = AdamW()
    losses: tuple[RouterLoss, ...] = ()
    compute_dtype: str = "bfloat16"
    remat: Remat | None = KeepNothing()
    name = "train"

    def check(self) -> None:
        for field in ("batch", "length", "accumulate"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        fix = f"It must divide batch = {self.batch}."
        check_that(self.batch % self.accumulate == 0, self, "accumulate", fix)
        _check_dtype(self, "compute_dtype")

    def program(self, model: ModelSpec, parallel: Parallel) -> StepProgram:
        steps = 1000  # of the schedule, on which no shape depends
        structure, state, placement = outline_on_mesh(model, self.optimizer, steps, parallel)
        step = train_step(
            structure,
            self.optimizer,
            steps,
            losses=self.losses,
            accumulate=self.accumulate,
            dtype=DTYPES[self.compute_dtype],
            remat=self.remat,
            placement=placement,
        )
        tokens = _rows((self.batch, self.length + 1), jnp.int32, parallel)
        held = {
            "parameters": (state.trainable, state.frozen),
            "optimizer": state.optimizer,
        }
        return StepProgram(step, (state, tokens), held, self.batch * self.length, True)


@spec
class PodPrefillStep:
    """Reads `batch` prompts of `length` tokens into an empty sequence state.

    recipe: passes that change formats first, such as `Quantize`; dtype: of plain parameters,
    activations and state.
    """

    batch: int
    length: int
    recipe: tuple[Step, ...] = ()
    dtype: str = "bfloat16"
    name = "prefill"

    def check(self) -> None:
        for field in ("batch", "length"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        _check_dtype(self, "dtype")

    def program(self, model: ModelSpec, parallel: Parallel) -> StepProgram:
        graphdef, parameters, state = serving(model, self, parallel, self.length)
        prompt = _rows((self.batch, self.length), jnp.int32, parallel)
        mask = _rows((self.batch, self.length), jnp.bool_, parallel)

        held = {"parameters": parameters, "sequence state": state}
        arguments = (graphdef, DTYPES[self.dtype], parallel, parameters, prompt, mask, state)
        return StepProgram(prefill, arguments, held, self.batch * self.length, False)


@spec
class PodDecodeStep:
    """One new token of each of `batch` sequences, the state holding `length` tokens.

    recipe, dtype: as of `PodPrefillStep`.
    """

    batch: int
    length: int
    recipe: tuple[Step, ...] = ()
    dtype: str = "bfloat16"
    name = "decode"

    def check(self) -> None:
        for field in ("batch", "length"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        _check_dtype(self, "dtype")

    def program(self, model: ModelSpec, parallel: Parallel) -> StepProgram:
        graphdef, parameters, state = serving(model, self, parallel, self.length)
        logits = _rows((self.batch, model.vocab), jnp.float32, parallel)
        position = _rows((self.batch,), jnp.int32, parallel)
        key = jax.eval_shape(lambda: jax.random.key(0))

        held = {"parameters": parameters, "sequence state": state}
        static = (graphdef, Greedy(), 1, DTYPES[self.dtype], parallel)
        arguments = (*static, parameters, logits, position, state, key)
        return StepProgram(decode, arguments, held, self.batch, False)


def serving(
    model: ModelSpec, step: PodPrefillStep | PodDecodeStep, parallel: Parallel, length: int
) -> tuple[Any, Shapes, Shapes]:
    """(graphdef, parameters, sequence state) of a model to serve, after its recipe, as shapes."""
    dtype = DTYPES[step.dtype]
    outline = abstract_model(model, dtype=dtype)
    for one in step.recipe:
        outline, _ = one.outline(outline)
    graphdef, parameters = nnx.split(place(outline, parallel.mesh, parallel.rules))
    state = jax.eval_shape(lambda: init_state(outline, step.batch, length, dtype))
    cut = batch_axes(step.batch, parallel.mesh.shape) or None

    def led_by_layers(leaf: Any) -> Any:
        where = P(None, cut) if leaf.ndim > 1 else P()
        sharding = NamedSharding(parallel.mesh, where)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return graphdef, parameters, jax.tree.map(led_by_layers, state)


def bytes_on_device(shapes: Shapes) -> int:
    """Bytes of one device that arrays of these shapes and shardings take."""
    total = 0
    for leaf in jax.tree.leaves(shapes):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += jax.ShapeDtypeStruct(shape, leaf.dtype).size * _itemsize(leaf.dtype)
    return total


def _itemsize(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else jnp.dtype(dtype).itemsize


def _rows(shape: tuple[int, ...], dtype: Any, parallel: Parallel) -> Any:
    """A batch of rows, cut over the devices that rows are cut over."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(parallel.mesh, shape[0]))


def _check_dtype(owner: Any, field: str) -> None:
    fix = f"Choose one of {', '.join(DTYPES)}."
    check_that(getattr(owner, field) in DTYPES, owner, field, fix)
