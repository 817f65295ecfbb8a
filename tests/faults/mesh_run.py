"""A tiny run of several processes, of which one can be told to die.

python -m tests.faults.mesh_run FOLDER STEPS [PROCESS STEP SIGNAL]
"""

import os
import sys
from pathlib import Path

import jax

from moejax.core import processes
from moejax.jobs.on_mesh import OnMesh
from moejax.mesh import MeshSpec
from moejax.mesh.processes import start
from moejax.moe import PaddedAllToAll
from moejax.runs import RunFolder
from moejax.train.log import TrainLog
from tests.faults import tiny_run

ON = OnMesh(mesh=MeshSpec(expert=-1), strategy=PaddedAllToAll())


def run(path: Path, steps: int, on: OnMesh | None) -> None:
    """Runs or resumes in a folder, as `moejax run` does."""

    def make() -> RunFolder:
        return RunFolder.create(path, "Train", f"{steps} steps", ["mesh_run.py"])

    with processes.on_first(make) or RunFolder.join(path) as folder:
        tiny_run.job(steps=steps, checkpoint_every=4, on=on).run(folder)


def doom(process: int, step: int, number: int) -> None:
    """One process gets a signal after it took a step."""
    add = TrainLog.add

    def add_and_die(self, done, tokens, said):
        add(self, done, tokens, said)
        if done == step and jax.process_index() == process:
            os.kill(os.getpid(), number)

    TrainLog.add = add_and_die


if __name__ == "__main__":
    start()
    folder, steps, *fate = sys.argv[1:]
    if fate:
        doom(*map(int, fate))
    run(Path(folder), int(steps), ON)
