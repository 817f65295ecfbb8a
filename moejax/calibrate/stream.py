"""A text on its way through a model, one layer at a time: statistics are taken where it stands."""

from __future__ import annotations

import functools
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax.calibrate.accumulators import Accumulator, Tokens
from moejax.calibrate.spool import DiskSpool, MemorySpool, Spool
from moejax.calibrate.statistics import LayerStatistics
from moejax.calibrate.text import CalibrationText
from moejax.core import MoejaxError, compat
from moejax.models import Block, Carry, DecoderLM, ModelSpec
from moejax.models.decoder import lookup, run_block
from moejax.runs import Progress

HOST_BYTES = 1 << 30  # a text whose residual stream is larger waits on disk
States = dict[Accumulator, Any]
_NONE = np.int32(2**31 - 1)


class LayerStream:
    """The inputs of one layer, for every batch of a text.

    `collect` takes statistics of a block on them, `advance` replaces them by what the block makes
    of them, `through` does both in one pass. The block is the caller's: the model's own or what
    compression made of it. Positions, masks and router context are those of `models.encode`.

    devices: batches are dealt to them in turn, and each holds sums of its own, merged at the end of
    a layer. Beside a block and the activations of a batch per device, only the sums of one layer
    exist, updated in place. Raises MoejaxError where an activation or a statistic is not finite.
    """

    def __init__(
        self,
        model: DecoderLM,
        text: CalibrationText,
        *,
        dtype: Any = jnp.float32,
        devices: Sequence[Any] | None = None,
        spool: Spool | None = None,
        layer: int = 0,
        progress: Progress | None = None,
    ):
        """spool: holds the inputs of `layer`; None for one in memory or in a temporary folder."""
        text.check_vocabulary(model.spec.vocab)
        self.spec, self.layer = model.spec, layer
        self._text, self._dtype, self._progress = text, jnp.dtype(dtype), progress
        self._devices = list(devices or [None])[: len(text.batches)]
        self._table = compat.read(model.embed) if layer == 0 else None
        self._carries: dict[int, Any] = {}  # of batches, on the host, where layers above read it
        self._closing = ExitStack()
        self._spool = spool or self._own_spool()

    @property
    def tokens(self) -> int:
        """Valid tokens of the text."""
        return self._text.tokens

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back what the stream holds."""
        self._closing.close()
        self._spool, self._table, self._carries = MemorySpool(), None, {}

    def collect(self, block: Block, accumulators: Sequence[Accumulator]) -> LayerStatistics:
        """Statistics of `block` as the layer where the stream stands, by name."""
        return self._finalized(self.accumulate(block, accumulators, onward=False))

    def advance(self, block: Block) -> None:
        """Moves the stream through `block`."""
        self.accumulate(block, (), onward=True)

    def through(self, block: Block, accumulators: Sequence[Accumulator]) -> LayerStatistics:
        """`collect` and `advance` in one pass."""
        layer = self.layer
        return self._finalized(self.accumulate(block, accumulators, onward=True), layer)

    def accumulate(
        self, block: Block, accumulators: Sequence[Accumulator], *, onward: bool
    ) -> States:
        """States of the accumulators that apply, not finalized; onward: advances as well."""
        graphdef, parameters = nnx.split(block)
        unique = dict.fromkeys(accumulators)
        chosen = tuple(a for a in unique if applies(a, block.spec, self.spec))
        lanes = [_Lane(device, parameters) for device in self._devices]
        for lane in lanes:
            lane.states = lane.put(tuple(a.init(block.spec, self.spec) for a in chosen))
        wanted = self.spec.carried_into(self.layer + 1) if onward else frozenset()
        running: deque[tuple[int, Array, Any]] = deque()
        with self._spool.writing(self.layer + 1) if onward else nullcontext() as write:

            def settle() -> None:
                # Waiting for a batch that was sent off earlier bounds how many are in flight.
                number, y_BxSxD, carry = running.popleft()
                if write is None:
                    y_BxSxD.block_until_ready()
                else:
                    write(number, np.asarray(y_BxSxD))
                    self._carries[number] = jax.device_get(carry)

            for number, batch in enumerate(self._text.batches):
                lane = lanes[number % len(lanes)]
                numbers = (number, self._text.starts[number], self._text.group(number))
                lane.states, lane.bad, y_BxSxD, carry = _step(
                    graphdef,
                    lane.parameters,
                    lane.states,
                    lane.bad,
                    self._inputs(number, lane),
                    lane.put(batch.tokens_BxS),
                    lane.put(batch.mask_BxS),
                    lane.put(self._carries.get(number, {})),
                    lane.put(np.asarray(numbers, np.uint32)),
                    accumulators=chosen,
                    wanted=wanted,
                )
                running.append((number, y_BxSxD, carry))
                del y_BxSxD, carry
                if len(running) > len(lanes):
                    settle()
                if self._progress is not None:
                    self._progress.advance(1)
            while running:
                settle()
            self._check_finite(min(int(lane.bad) for lane in lanes))
        states = lanes[0].states
        for lane in lanes[1:]:
            states = _merged(states, lanes[0].put(lane.states), accumulators=chosen)
            lane.states = ()
        if onward:
            self.layer, self._table = self.layer + 1, None
        return dict(zip(chosen, states, strict=True))

    def _inputs(self, number: int, lane: _Lane) -> Array:
        if self._table is None:
            return lane.put(self._spool.read(number))
        tokens_BxS = self._text.batches[number].tokens_BxS
        return lane.put(_lookup(self.spec, self._table, tokens_BxS, self._dtype))

    def _finalized(self, states: States, layer: int | None = None) -> LayerStatistics:
        layer = self.layer if layer is None else layer
        found = {}
        while states:  # one at a time, so that no statistic exists twice
            accumulator = next(iter(states))
            found[accumulator.name] = finalized(accumulator, states.pop(accumulator), layer)
        return found

    def _check_finite(self, bad: int) -> None:
        if bad != _NONE:
            raise MoejaxError(
                f"an activation of layer {self.layer} is not finite, first in batch {bad} of group "
                f"{self._text.batches[bad].group!r}.",
                "The model overflows on the calibration text: check its weights.",
            )

    def _own_spool(self) -> Spool:
        shapes = stream_shapes(self._text, self.spec.width)
        if sum(int(np.prod(shape)) for shape in shapes) * self._dtype.itemsize <= HOST_BYTES:
            return MemorySpool()
        folder = self._closing.enter_context(tempfile.TemporaryDirectory(prefix="moejax-stream-"))
        return DiskSpool(Path(folder), shapes, self._dtype)


def stream_shapes(text: CalibrationText, width: int) -> list[tuple[int, ...]]:
    """[B, S, D] of every batch."""
    return [(*batch.tokens_BxS.shape, width) for batch in text.batches]


def applies(accumulator: Accumulator, layer: Any, model: Any) -> bool:
    """Whether an accumulator says anything of a layer; nothing is allocated."""
    return jax.eval_shape(lambda: accumulator.init(layer, model)) is not None


def finalized(accumulator: Accumulator, state: Any, layer: int) -> np.ndarray:
    """The statistic on the host; MoejaxError where it is not finite."""
    value = accumulator.finalize(state)
    rows = value if value.ndim > 1 else value[None]
    if not all(np.isfinite(row).all() for row in rows):  # row by row: no mask of its whole size
        raise MoejaxError(
            f"{accumulator.name} of layer {layer} is not finite.",
            "The model overflows on the calibration text: check its weights.",
        )
    return value


def release(block: Block) -> None:
    """Frees the arrays of a block that `models.decoder.layer` made and nobody else holds.

    NNX variables are parts of reference cycles (flax 0.12): without this, the weights of past
    layers pile up until Python's garbage collector happens to run.
    """
    for leaf in jax.tree.leaves(nnx.split(block)[1]):
        leaf.delete()


class _Lane:
    """What one device holds: the block, its sums, and the first batch that was not finite."""

    def __init__(self, device: Any, parameters: Any):
        self._device = device
        self.parameters = self.put(parameters) if device is not None else parameters
        self.states: tuple[Any, ...] = ()
        self.bad = self.put(_NONE)

    def put(self, value: Any) -> Any:
        return jax.device_put(value, self._device)


@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def _lookup(spec: ModelSpec, table_VxD: Any, tokens_BxS: Array, dtype: Any) -> Array:
    return lookup(spec, table_VxD, tokens_BxS, dtype)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "accumulators", "wanted"), donate_argnames=("states",)
)
def _step(
    graphdef: Any,
    parameters: Any,
    states: tuple[Any, ...],
    bad: Array,
    x_BxSxD: Array,
    tokens_BxS: Array,
    mask_BxS: Array,
    carry: Carry,
    numbers: Array,
    *,
    accumulators: tuple[Accumulator, ...],
    wanted: frozenset[str],
) -> tuple[tuple[Any, ...], Array, Array, Carry]:
    """States with one batch more, the first batch that is not finite, the block's output and carry.

    numbers: of the batch, of its first token, of its group. wanted: what layers above read of the
    carry. Equal blocks share one program.
    """
    request = frozenset().union(*(a.request for a in accumulators))
    y_BxSxD, found, carry = run_block(
        nnx.merge(graphdef, parameters), x_BxSxD, tokens_BxS, mask_BxS, request, carry
    )
    carry = {name: value for name, value in carry.items() if name in wanted}
    mask_T = mask_BxS.reshape(-1)
    number, first, group = numbers[0].astype(jnp.int32), numbers[1].astype(jnp.int32), numbers[2]
    index_T = jnp.where(mask_T, first + jnp.cumsum(mask_T, dtype=jnp.int32) - 1, -1)
    tokens = Tokens(mask_T, index_T, group)
    finite = jnp.all(jnp.isfinite(jnp.where(mask_BxS[..., None], y_BxSxD, 0)))
    bad = jnp.minimum(bad, jnp.where(finite, _NONE, number))
    pairs = zip(accumulators, states, strict=True)
    return tuple(a.update(state, found, tokens) for a, state in pairs), bad, y_BxSxD, carry


@functools.partial(jax.jit, static_argnames=("accumulators",), donate_argnums=0)
def _merged(
    mine: tuple[Any, ...], theirs: tuple[Any, ...], *, accumulators: tuple[Accumulator, ...]
) -> tuple[Any, ...]:
    return tuple(a.merge(m, t) for a, m, t in zip(accumulators, mine, theirs, strict=True))
