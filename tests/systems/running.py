"""Runs the config of a system once for the tests of a module."""

import math
from collections.abc import Sequence

from moejax.config import load_config
from moejax.runs import Ledger, RunFolder, StudyResult

NANO = (
    "SavedModel.path = 'nano'",
    "Text.bytes_per_group = 16384",
    "calibration/Text.skip_bytes = 16384",
)
"""A study of the reference model on nano and little text."""

RECOVERY = (
    "recovery/Text.skip_bytes = 32768",
    "recovery/Text.bytes_per_group = 65536",
    "recovery/Text.window = 64",
)
"""The same for what a recovery trains on."""


class Ran:
    """What a system's study found: `result` and `ledger`."""

    def __init__(self, result: StudyResult, ledger: Ledger):
        self.result, self.ledger = result, ledger

    def damage(self, arm: str) -> float:
        """Nats per token lost against the arm's base."""
        return self.result.arm(arm).average.delta_nll

    def change(self, arm: str) -> float:
        """Relative change of perplexity."""
        return math.expm1(self.damage(arm))

    def starting(self, words: str) -> list[str]:
        """The arms whose names begin so."""
        return [arm.name for arm in self.result.arms if arm.name.startswith(words)]


def run_system(name: str, root, overrides: Sequence[str] = ()) -> Ran:
    """The study of configs/systems/<name>.gin under `root`; overrides as for --set."""
    system = f"systems/{name}"
    config = load_config(system, list(overrides))
    folder = RunFolder.create(root / "run", "Study", config.text, ["moejax", "run", system])
    with folder:
        config.job().run(folder)
    return Ran(StudyResult.load(folder.results_path), Ledger.load(folder.ledger_path))
