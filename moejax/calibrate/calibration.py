"""Calibration: one pass of a text through a model, cached on disk, resumed where it was killed."""

from __future__ import annotations

import functools
import shutil
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.calibrate.accumulators import Accumulator
from moejax.calibrate.fingerprint import fingerprint, model_hash, statistic_key
from moejax.calibrate.spool import DiskSpool
from moejax.calibrate.statistics import Statistics
from moejax.calibrate.store import read_statistic, write_statistic
from moejax.calibrate.stream import LayerStream, applies, release, stream_shapes
from moejax.calibrate.text import CalibrationText, calibration_text
from moejax.core import RunError, to_json
from moejax.core.atomic import read_json, write_json
from moejax.data import EvalBatch
from moejax.files import content_hash
from moejax.models import DecoderLM
from moejax.models.decoder import layer
from moejax.runs import Progress, lock, progress

Wanted = list[tuple[Accumulator, ...]]  # per layer, what is to be collected there


class Calibration:
    """Statistics of models on one text; a `StatisticsSource` for `compress`.

    dtype: of activations. cache: folder in which finished statistics are kept under a hash of all
    that decides them, so that studies share them and a killed pass goes on at its last finished
    layer; large ones are mapped from there instead of held in memory. devices: see `LayerStream`.
    What was collected of a model is also remembered for as long as the model lives.
    """

    def __init__(
        self,
        batches: Iterable[EvalBatch],
        *,
        dtype: Any = jnp.float32,
        cache: Path | None = None,
        devices: Sequence[Any] | None = None,
    ):
        """batches: read once, when the first statistic is asked for."""
        self._batches, self._dtype, self._devices = batches, dtype, devices
        self._cache = None if cache is None else Path(cache)
        self._models: weakref.WeakKeyDictionary[DecoderLM, _Known] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        model: DecoderLM,
        accumulators: Sequence[Accumulator],
        *,
        progress: Progress | None = None,
    ) -> Statistics:
        """Statistics of every layer, of which only those not known yet are collected, in one pass.

        progress: advances by one per layer and batch; None for a bar of its own. Raises DataError
        for text without tokens or of another vocabulary, MoejaxError for what is not finite.
        """
        self._text.check_vocabulary(model.spec.vocab)
        chosen = tuple(dict.fromkeys(accumulators))
        known = self._known(model)
        wanted = [
            tuple(a for a in chosen if a not in found and applies(a, spec, model.spec))
            for spec, found in zip(model.spec.layers, known.layers, strict=True)
        ]
        if any(wanted):
            self._complete(model, known, wanted, progress)
        layers = tuple({a.name: found[a] for a in chosen if a in found} for found in known.layers)
        mark = fingerprint(known.sha256, self._text, chosen, self._dtype)
        return Statistics(layers, self._text.tokens, mark, self._text.batches)

    def stream(self, model: DecoderLM) -> LayerStream:
        """The text before the first layer of `model`, to be led through blocks one by one."""
        return LayerStream(model, self._text, dtype=self._dtype, devices=self._devices)

    @functools.cached_property
    def _text(self) -> CalibrationText:
        return calibration_text(self._batches)

    def _known(self, model: DecoderLM) -> _Known:
        leaves = jax.tree.leaves(nnx.split(model)[1])
        known = self._models.get(model)
        if known is None or not known.holds_for(leaves):
            known = _Known(leaves, model_hash(model), [{} for _ in model.spec.layers])
            self._models[model] = known
        return known

    def _complete(
        self, model: DecoderLM, known: _Known, wanted: Wanted, bar: Progress | None
    ) -> None:
        """Adds the wanted statistics to what is known: from disk, or else collected."""
        if self._cache is None:
            self._walk(LayerStream, model, known, wanted, 0, bar)
            return
        identity = fingerprint(
            known.sha256, self._text, tuple(dict.fromkeys(sum(wanted, ()))), self._dtype
        )
        folder = self._cache / "walks" / content_hash(identity, [to_json(w) for w in wanted])
        for index, asked in enumerate(wanted):
            for accumulator in asked:
                found = read_statistic(self._cache, self._key(known, accumulator, index))
                if found is not None:
                    known.layers[index][accumulator] = found
        missing = [
            tuple(a for a in asked if a not in found)
            for asked, found in zip(wanted, known.layers, strict=True)
        ]
        if not any(missing):
            shutil.rmtree(folder, ignore_errors=True)
            return
        with _exclusive(folder) as mine:
            if not mine:  # another process is at it: collect beside it, without a spool to resume
                self._walk(LayerStream, model, known, missing, 0, bar)
                return
            plan, start, spool = self._resumed(folder, model, wanted, missing)
            stream = functools.partial(LayerStream, spool=spool)
            self._walk(stream, model, known, plan, start, bar)

    def _resumed(
        self, folder: Path, model: DecoderLM, wanted: Wanted, missing: Wanted
    ) -> tuple[Wanted, int, DiskSpool]:
        """What to collect, from which layer on, and the spool that holds its inputs.

        A walk that is taken up again keeps to its plan: a layer's program, and so the rounding of
        its results, depends on all that is collected there.
        """
        spool = DiskSpool(folder, stream_shapes(self._text, model.spec.width), self._dtype)
        first = next(i for i, asked in enumerate(missing) if asked)
        path = folder / "plan.json"
        try:
            names = read_json(path)
            plan = [
                tuple(a for a in asked if a.name in chosen)
                for asked, chosen in zip(wanted, names, strict=True)
            ]
        except (RunError, TypeError, ValueError):
            plan = missing
            write_json(path, [[a.name for a in asked] for asked in missing])
        if not all(set(m) <= set(p) for m, p in zip(missing, plan, strict=True)):
            plan = wanted  # a finished statistic was damaged since
        # A spool holds the residual stream alone: no walk begins where layers read more than that.
        alone = (n for n in spool.layers() if not model.spec.carried_into(n))
        usable = (n for n in alone if 0 < n <= first and spool.go_to(n))
        return plan, next(usable, 0), spool

    def _walk(
        self,
        stream: Any,
        model: DecoderLM,
        known: _Known,
        plan: Wanted,
        start: int,
        bar: Progress | None,
    ) -> None:
        """Collects layer by layer from `start` to the last one that has something to collect."""
        stop = 1 + max(i for i, asked in enumerate(plan) if asked)
        with _bar(bar, (stop - start) * len(self._text.batches)) as shown:
            options = {"dtype": self._dtype, "devices": self._devices}
            with stream(model, self._text, layer=start, progress=shown, **options) as at:
                for index in range(start, stop):
                    take = at.collect if index + 1 == stop else at.through
                    block = layer(model, index)
                    found = dict(take(block, plan[index]))
                    release(block)
                    for accumulator in plan[index]:
                        value = found.pop(accumulator.name)
                        known.layers[index][accumulator] = self._kept(
                            known, accumulator, index, value
                        )
                        del value

    def _kept(
        self, known: _Known, accumulator: Accumulator, index: int, value: np.ndarray
    ) -> np.ndarray:
        if self._cache is None:
            return value
        return write_statistic(self._cache, self._key(known, accumulator, index), value)

    def _key(self, known: _Known, accumulator: Accumulator, index: int) -> str:
        return statistic_key(known.sha256, self._text, accumulator, index, self._dtype)


@dataclass
class _Known:
    """What is known of a model. leaves: its arrays at the time; a model's may be replaced."""

    leaves: list[Any]
    sha256: str
    layers: list[dict[Accumulator, np.ndarray]] = field(default_factory=list)

    def holds_for(self, leaves: list[Any]) -> bool:
        same = (a is b for a, b in zip(self.leaves, leaves, strict=False))
        return len(self.leaves) == len(leaves) and all(same)


@contextmanager
def _bar(given: Progress | None, total: int) -> Iterator[Progress]:
    if given is not None:
        yield given
        return
    with progress(total, "calibrate", "batches") as bar:
        yield bar


@contextmanager
def _exclusive(folder: Path) -> Iterator[bool]:
    """Whether `folder` is this process's alone; it is removed once the block has ended well."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written: {error.strerror or error}.",
            "Calibrate with another cache folder.",
        ) from error
    try:
        lock.hold(folder)
    except RunError:
        yield False
        return
    try:
        yield True
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release(folder)
