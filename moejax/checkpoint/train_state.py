"""Checkpoints of a training run: everything that the next step depends on, written by Orbax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from moejax.core import CheckpointError, RunError
from moejax.core.paths import Folder, folder_of

_METRIC = "metric"


class TrainCheckpoints:
    """Training states by step in one folder: the last `keep_last`, and the best `keep_best`.

    Every process of a run makes one of the same folder and calls the same methods; each writes and
    reads the parts of arrays that its devices hold. What is saved does not depend on the mesh: it
    is restored on any other, and under any strategy.

    A save copies the arrays off the device and returns; they are written in the background, under
    a temporary name until all of them are there. Whatever moment the process is killed at, the
    newest complete checkpoint can be restored. What a killed process left half-written is removed
    here, when the folder is opened for the next run.
    """

    def __init__(self, folder: Folder | str, keep_last: int = 2, keep_best: int = 0):
        """Raises RunError if the folder cannot be written.

        folder: on a disk that all processes reach, or in a bucket, as gs://name/run.
        keep_last: at least 1. keep_best: of those saved with a metric, the lowest are the best.
        """
        if keep_last < 1 or keep_best < 0:
            raise RunError(
                f"keep_last = {keep_last} and keep_best = {keep_best} leave nothing to resume.",
                "Choose keep_last from 1 and keep_best from 0.",
            )
        self.folder = folder_of(folder)
        self._keep_best = keep_best
        policies = ocp.checkpoint_managers
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._orbax = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    best_fn=(lambda metrics: metrics[_METRIC]) if keep_best else None,
                    best_mode="min",
                    preservation_policy=policies.AnyPreservationPolicy(
                        [
                            policies.LatestN(keep_last),
                            policies.BestN(
                                get_metric_fn=lambda metrics: -metrics[_METRIC],
                                n=keep_best,
                            ),
                        ]
                    ),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
            )
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        metric: float | None = None,
    ) -> None:
        """Begins to write a checkpoint; the arrays may be donated as soon as this returns.

        state: pytree of arrays. position: JSON-ready, such as where the data is. metric: lower is
        better, None ranks last. A step that is there stays as it is.
        Raises RunError when this or the save before could not be written.
        """
        if step in self.steps():
            return
        try:
            self._orbax.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    position=ocp.args.JsonSave(dict(position)),
                ),
                metrics={_METRIC: math.inf if metric is None else float(metric)},
            )
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, position) of the newest complete checkpoint, None where there is none.

        like: a state of the same run; its shapes, dtypes and placement are what comes back.
        Raises CheckpointError if the checkpoint is damaged or of another model or optimizer.
        """
        step = self._orbax.latest_step()
        return None if step is None else (step, *self.restore(step, like))

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, position) as they were saved at `step`; raises as `restore_latest`."""
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_shape, like)),
            position=ocp.args.JsonRestore(),
        )
        try:
            found = self._orbax.restore(step, args=wanted)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} cannot be restored: {reason[0]}",
                f"If it is damaged, remove {self.folder / str(step)} to resume from the one "
                "before; if model or optimizer changed, choose another run folder.",
            ) from error
        return found["state"], found["position"]

    def steps(self) -> tuple[int, ...]:
        """The steps that are saved or being saved, first to last."""
        return tuple(sorted(self._orbax.all_steps()))

    def best_step(self) -> int | None:
        """The step of the lowest metric among those kept; None without `keep_best`."""
        return self._orbax.best_step() if self._keep_best else None

    def wait(self) -> None:
        """Returns when everything is on disk; RunError if it could not be written."""
        try:
            self._orbax.wait_until_finished()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def close(self) -> None:
        """Waits, then frees the background threads."""
        self.wait()
        self._orbax.close()

    def __enter__(self) -> TrainCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unwritable(folder: Folder, error: OSError) -> RunError:
    return RunError(
        f"{folder} cannot be written: {error.strerror or error}.",
        "Free space or choose another folder with --out, then run the same command again.",
    )


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
