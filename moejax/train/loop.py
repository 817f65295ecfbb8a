"""The training loop: steps, metrics, evaluation, checkpoints, and how it stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moejax.models import DecoderLM, Structure, combine
from moejax.runs import Metrics, progress
from moejax.runs.metrics import BITS_PER_BYTE
from moejax.train.interruption import Interruption
from moejax.train.log import TrainLog
from moejax.train.state import TrainState
from moejax.train.step import Step

if TYPE_CHECKING:
    from moejax.checkpoint import TrainCheckpoints

Evaluator = Callable[[DecoderLM], Mapping[str, float]]


class BatchSource(Protocol):
    """An endless iterator of batches that knows where it is; `data.Batches` is one."""

    def __next__(self) -> Any: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many steps, and after how many of them what happens; 0 for at the end only.

    Metrics reach the host, and a NaN is noticed, every `log_every` steps and before every save.
    """

    steps: int
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0

    def due(self, every: int, step: int) -> bool:
        """Whether what happens `every` so many steps happens after `step` steps."""
        return step == self.steps or (every > 0 and step % every == 0)


def train(
    structure: Structure,
    state: TrainState,
    step: Step,
    batches: BatchSource,
    schedule: Schedule,
    *,
    metrics: Metrics,
    checkpoints: TrainCheckpoints,
    evaluators: Sequence[Evaluator] = (),
) -> TrainState:
    """Trains to the end of the schedule, from the newest checkpoint if there is one.

    A resumed run continues bit for bit as if it had never stopped: parameters, optimizer, router
    state, data position and the draws of every step; metrics after the restored step are cut off.
    evaluators: model -> name -> number, after every `evaluate_every` steps and at the end. The mean
    of their `bits_per_byte/...` is what makes a checkpoint of the same step the best.
    SIGTERM and Ctrl-C end the step at hand, save a checkpoint and raise SystemExit(128 + signal);
    of several processes all stop after the same step, whichever of them got the signal.
    Raises RunError naming the step whose loss or gradient is NaN or infinite; checkpoints that were
    saved before stay.
    """
    state = _resume(state, batches, metrics, checkpoints)
    done = int(state.step)
    layers = combine(structure, state.trainable, state.frozen).spec.moe_layers
    with progress(schedule.steps - done, "train", "steps") as bar, Interruption() as interruption:
        log = TrainLog(layers, metrics, bar)
        while done < schedule.steps:
            tokens_BxS1 = next(batches).tokens_BxS1
            state, said = step(state, tokens_BxS1)
            done += 1
            rows, length = tokens_BxS1.shape
            log.add(done, rows * (length - 1), said)
            stop = interruption.stops_after(done)
            stopping = stop is not None
            evaluating = bool(evaluators) and schedule.due(schedule.evaluate_every, done)
            evaluating = evaluating and not stopping
            saving = schedule.due(schedule.checkpoint_every, done) or stopping
            if schedule.due(schedule.log_every, done) or evaluating or saving:
                log.flush()
            score = None
            with log.pause():
                if evaluating:
                    model = combine(structure, state.trainable, state.frozen)
                    found = {k: v for evaluator in evaluators for k, v in evaluator(model).items()}
                    log.evaluated(done, found)
                    score = _score(found)
                if saving:
                    checkpoints.save(done, state, {"data": batches.state()}, score)
            if stopping:
                checkpoints.wait()
                raise SystemExit(128 + stop)
    checkpoints.wait()
    return state


def _resume(
    state: TrainState, batches: BatchSource, metrics: Metrics, checkpoints: TrainCheckpoints
) -> TrainState:
    """The newest checkpoint's state, with data and metrics put to its step; `state` if none."""
    found = checkpoints.restore_latest(state)
    if found is None:
        metrics.truncate_after(0)
        return state
    step, restored, position = found
    batches.restore(position["data"])
    metrics.truncate_after(step)
    return restored


def _score(found: Mapping[str, float]) -> float | None:
    """Mean bits per byte over groups; None where nothing measured them."""
    parts = [value for name, value in found.items() if name.startswith(f"{BITS_PER_BYTE}/")]
    return sum(parts) / len(parts) if parts else None
