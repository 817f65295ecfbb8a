"""A tiny calibration that can be told to die: `python tiny_calibration.py CACHE [LAYER BATCH]`."""

import os
import signal
import sys
from pathlib import Path

from moejax.calibrate import Calibration, ExpertCounts, LayerInputs, SecondMoments
from tests.evaluate.conftest import cut, make_model, make_spec, make_tokens, routed

CHOSEN = (ExpertCounts(), SecondMoments(), LayerInputs(tokens=8))
LAYERS, BATCHES = 4, 3


class Fate:
    """A progress that ends its own process once it was advanced so often."""

    def __init__(self, steps: int):
        self.steps = steps

    def advance(self, n: int = 1) -> None:
        self.steps -= n
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def run(cache: Path, steps: int) -> int:
    """Calibrates in `cache` and dies after so many batches of any layers; gives how many."""
    model = make_model(0, make_spec(*[routed(4)] * LAYERS))
    text = cut({"docs": make_tokens(90)}, 2)
    assert len(text) == BATCHES
    bar = Fate(steps)
    Calibration(text, cache=cache)(model, CHOSEN, progress=bar)
    return steps - bar.steps


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), int(sys.argv[2])))
