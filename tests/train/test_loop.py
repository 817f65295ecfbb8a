"""The loop: what it writes when, how it stops and resumes. Only the step is a fake."""

import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import TrainCheckpoints
from moejax.core import RunError
from moejax.data import Batch
from moejax.models import Structure
from moejax.runs import Metrics, read_metrics
from moejax.train import Schedule, StepMetrics, TrainState, train
from moejax.train.log import load_entropy


class Rows:
    """Batches that count up, with an exact position."""

    def __init__(self):
        self.row = 0

    def __next__(self):
        self.row += 1
        return Batch(np.full((2, 5), self.row, np.int32), np.zeros(2, np.int32))

    def state(self):
        return {"row": self.row}

    def restore(self, state):
        self.row = state["row"]


def fake_step(on_step=lambda step: None, losses=None):
    """A step that folds every token it sees into one parameter, in an order that matters."""

    def step(state, tokens_BxS1):
        number = int(state.step) + 1
        on_step(number)
        value = state.trainable["embed"] * 0.5 + tokens_BxS1.sum()
        said = StepMetrics(
            loss=jnp.float32((losses or {}).get(number, 1 / number)),
            objective=jnp.float32(1),
            gradient_norm=jnp.float32(2),
            learning_rate=jnp.float32(3),
            router_losses={},
            counts=(jnp.float32([6, 2, 0, 0]), jnp.float32([2, 2, 2, 2])),
        )
        after = TrainState(state.step + 1, {"embed": value}, state.frozen, state.optimizer)
        return after, said

    return step


@pytest.fixture
def run(tmp_path, parts):
    structure: Structure = parts[0]
    trainable = {**parts[1], "embed": parts[1]["embed"]}

    def go(steps=6, step=None, folder=tmp_path, evaluators=(), batches=None, **schedule):
        first = TrainState(jnp.int32(0), dict(trainable), dict(parts[2]), {"m": jnp.zeros(2)})
        step = step or fake_step()
        folder.mkdir(exist_ok=True)

        def keeping(state, tokens):
            after, said = step(state, tokens)
            kept = {**state.trainable, **after.trainable}
            return TrainState(after.step, kept, after.frozen, after.optimizer), said

        with Metrics(folder) as metrics, TrainCheckpoints(folder / "checkpoints") as checkpoints:
            return train(
                structure,
                first,
                keeping,
                batches or Rows(),
                Schedule(steps, **schedule),
                metrics=metrics,
                checkpoints=checkpoints,
                evaluators=evaluators,
            )

    return go


def rows(folder):
    timeless = [
        {k: v for k, v in row.items() if k != "tokens_per_second"}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return timeless


def test_every_step_has_its_line_and_every_interval_its_loads(run, tmp_path):
    """Catches lines of the last step of an interval only, and layers that are numbered wrongly."""
    run(steps=5, log_every=2)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in found] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert [row["tokens"] for row in found] == [8, 16, 24, 32, 40]
    assert ["load/layer_0" in row for row in found] == [False, True, False, True, True]
    assert found[1]["load/layer_0"] == [0.75, 0.25, 0, 0]
    assert found[0]["load_max_over_mean/layer_0"] == found[0]["load_max_over_mean"] == 3
    assert found[0]["load_entropy/layer_1"] == pytest.approx(1)


def test_the_host_waits_for_the_device_once_per_interval(run, monkeypatch):
    """Catches a loop that fetches the loss of every step and stalls an accelerator."""
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(len(x)) or device_get(x))
    run(steps=8, log_every=4)
    assert fetched == [4, 4]


def test_a_resumed_run_is_the_run_that_never_stopped(run, tmp_path):
    """Catches a data position that starts anew, lines written twice, or a checkpoint off by one."""
    whole = run(folder=tmp_path / "whole", steps=7, checkpoint_every=3)

    def stop(step):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path / "cut", steps=7, checkpoint_every=3, log_every=1, step=fake_step(stop))
    assert rows(tmp_path / "cut")[-1]["step"] == 5
    seen = []
    again = run(folder=tmp_path / "cut", steps=7, checkpoint_every=3, step=fake_step(seen.append))
    assert seen == [4, 5, 6, 7]
    np.testing.assert_array_equal(whole.trainable["embed"], again.trainable["embed"])
    with_loads = [r for r in rows(tmp_path / "cut") if "load/layer_0" in r]
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 8)) and with_loads
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "cut"), strict=True):
        assert a.items() <= b.items()  # the cut run logged every step, loads included


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(run, tmp_path, number):
    """Catches a scheduler's warning that loses all work since the last checkpoint."""
    before = signal.getsignal(number)

    def warn(step):
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as exit:
        run(steps=50, checkpoint_every=100, step=fake_step(warn))
    assert exit.value.code == 128 + number
    assert signal.getsignal(number) is before
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == (4,)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_is_named_and_never_saved(run, tmp_path, value):
    """Catches a diverged state that overwrites the last good checkpoint."""
    with pytest.raises(RunError, match=r"loss is (nan|inf) at step 5") as caught:
        run(steps=9, log_every=7, checkpoint_every=2, step=fake_step(losses={5: value}))
    assert "learning rate" in caught.value.fix
    with TrainCheckpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == 4
    assert rows(tmp_path)[-1]["step"] == 5


def test_evaluation_is_written_and_makes_the_best(run, tmp_path):
    """Catches evaluators that see stale parameters, and scores written for another step."""
    seen = []

    def evaluator(model):
        seen.append(float(model.embed.get_value()[0, 0]))
        return {"bits_per_byte/a": len(seen), "bits_per_byte/b": 3.0}

    last = run(steps=5, evaluate_every=2, evaluators=(evaluator,))
    found = {r["step"]: r["bits_per_byte/a"] for r in rows(tmp_path) if "bits_per_byte/a" in r}
    assert found == {2: 1, 4: 2, 5: 3}
    assert seen[-1] == float(last.trainable["embed"][0, 0]) and len(set(seen)) == 3


def test_a_finished_run_is_left_as_it_is(run, tmp_path):
    """Catches a rerun that trains on, or cuts the metrics of a finished run."""
    first = run(steps=3)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = run(steps=3, step=fake_step(lambda step: pytest.fail("it trained")))
    np.testing.assert_array_equal(first.trainable["embed"], again.trainable["embed"])
    assert [json.loads(line) for line in before.splitlines()] == [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]


def test_load_entropy_of_known_loads():
    """Catches a logarithm that is not divided by log E, and 0 log 0."""
    assert load_entropy(np.array([4.0, 4, 4, 4])) == pytest.approx(1)
    assert load_entropy(np.array([8.0, 0, 0, 0])) == pytest.approx(0)
    assert load_entropy(np.array([8.0, 8, 0, 0])) == pytest.approx(0.5)
