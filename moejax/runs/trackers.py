"""Trackers: where the numbers of a run go beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from moejax.core.errors import RunError
from moejax.runs.folder import RunFolder


class Tracker(Protocol):
    """Anything that takes the numbers of a step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Takes the numbers of one step."""
        ...

    def close(self) -> None:
        """Says that no more numbers come."""
        ...


class TensorBoard:
    """Writes scalars for TensorBoard into `tensorboard/` of the run folder.

    Raises RunError when tensorboardX is not installed.
    """

    def __init__(self, folder: RunFolder | Path | str):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise RunError(
                "The TensorBoard tracker needs the package tensorboardX, which is not installed.",
                'pip install "moejax[track]", or leave out the tracker: metrics.jsonl has all.',
            ) from error
        path = folder.path if isinstance(folder, RunFolder) else Path(folder)
        self._writer = SummaryWriter(str(path / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()
