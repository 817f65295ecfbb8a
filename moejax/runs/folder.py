"""The run folder: everything that is needed to judge a run and to run it again."""

from __future__ import annotations

import hashlib
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moejax.core.atomic import read_json, write_atomically, write_json
from moejax.core.errors import RunError
from moejax.runs.lock import hold, release
from moejax.runs.provenance import device_facts, git_state, versions

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"
ROOM_BYTES = 32 * 2**20


class RunFolder:
    """A folder that holds one run; built by `create` (to write) or `open` (to read).

    config.gin, run.json, log.txt, metrics.jsonl, ledger.jsonl, results.json, plots/, report.html,
    report.json, checkpoints/, model/. As a context manager it records how the run ended.

    facts: the content of run.json. resumed: whether `create` found this run already begun.
    writes: False in the processes of a run that leave the writing to the first.
    """

    def __init__(self, path: Path, facts: dict[str, Any], resumed: bool = False):
        self.path = path
        self.facts = facts
        self.resumed = resumed
        self.writes = True

    @classmethod
    def create(
        cls,
        path: Path | str,
        job: str,
        config_text: str,
        command: list[str],
        *,
        room_bytes: int = ROOM_BYTES,
    ) -> RunFolder:
        """Begins a run in `path`, or takes up the one of the same job and config found there.

        room_bytes: free space the run needs at least.
        Raises RunError when the folder holds another run or other files, is in use by another
        process, cannot be written or has no room.
        """
        path = Path(path)
        digest = config_hash(config_text)
        earlier = _earlier_run(path, job, digest)
        _make_room(path, room_bytes)
        hold(path)
        facts = {
            "job": job,
            "command": list(command),
            "config_sha256": digest,
            "versions": versions(),
            "git": git_state(),
            "device": device_facts(),
            "started": earlier["started"] if earlier else _now(),
            "resumed": [*earlier.get("resumed", []), _now()] if earlier else [],
            "earlier": _processes(earlier) if earlier else [],
            "status": RUNNING,
        }
        folder = cls(path, facts, resumed=earlier is not None)
        try:
            write_json(folder.run_path, facts)
            write_atomically(folder.config_path, config_text)
        except RunError:
            release(path)
            raise
        return folder

    @classmethod
    def join(cls, path: Path | str) -> RunFolder:
        """The folder that the first process of this run writes; nothing of it is touched here."""
        folder = cls(Path(path), {"status": RUNNING})
        folder.writes = False
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The run in `path`, to read; RunError when there is none."""
        path = Path(path)
        if not (path / "run.json").is_file():
            raise RunError(
                f"{path} holds no run: it has no run.json.",
                "Name the folder that a run wrote with --out.",
            )
        facts = read_json(path / "run.json")
        if not isinstance(facts, dict) or not {"job", "status", "config_sha256"} <= set(facts):
            raise RunError(f"{path / 'run.json'} is not of a run.", "Name another folder.")
        return cls(path, facts, resumed=True)

    def finish(self, status: str = FINISHED, **facts: Any) -> None:
        """Records how the run ended, with further facts, and lets go of the folder."""
        self.facts = {**self.facts, "status": status, "ended": _now(), **facts}
        if not self.writes:
            return
        try:
            write_json(self.run_path, self.facts)
        finally:
            release(self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is None:
            if self.facts["status"] == RUNNING:
                self.finish()
        elif issubclass(kind, Exception):
            self.finish(FAILED, error=f"{kind.__name__}: {error}")
        else:
            self.finish(INTERRUPTED)

    @property
    def run_path(self) -> Path:
        """run.json: what ran, on what, and how it ended."""
        return self.path / "run.json"

    @property
    def config_path(self) -> Path:
        """config.gin: the fully expanded config."""
        return self.path / "config.gin"

    @property
    def log_path(self) -> Path:
        """log.txt"""
        return self.path / "log.txt"

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl: a line per step."""
        return self.path / "metrics.jsonl"

    @property
    def ledger_path(self) -> Path:
        """ledger.jsonl: a line per expert matrix and pass."""
        return self.path / "ledger.jsonl"

    @property
    def results_path(self) -> Path:
        """results.json: a StudyResult."""
        return self.path / "results.json"

    @property
    def plots(self) -> Path:
        """The folder of the report's figures."""
        return self.path / "plots"

    @property
    def report_path(self) -> Path:
        """report.html; the same facts lie beside it in report.json."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of training checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The folder of the saved model."""
        return self.path / "model"


def config_hash(config_text: str) -> str:
    """SHA-256 of the config text, by which a folder knows its run again."""
    return hashlib.sha256(config_text.encode()).hexdigest()


def _processes(earlier: dict[str, Any]) -> list[dict[str, Any]]:
    """Command, versions, commit and device of each process that ran here before."""
    named = ("command", "versions", "git", "device")
    return [*earlier.get("earlier", []), {name: earlier.get(name) for name in named}]


def _earlier_run(path: Path, job: str, digest: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not path.is_dir():
        raise RunError(f"{path} is a file, not a folder.", "Choose another folder with --out.")
    if (path / "run.json").exists():
        facts = RunFolder.open(path).facts
        if facts["job"] == job and facts["config_sha256"] == digest:
            return facts
        what = (
            f"a run of job {facts['job']!r}" if facts["job"] != job else "a run of another config"
        )
        raise RunError(
            f"{path} already holds {what}.", "Choose another folder with --out, or remove it."
        )
    try:
        others = [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError as error:
        raise _unusable(path, error) from error
    if others:
        raise RunError(
            f"{path} holds files that are not of a run ({sorted(others)[0]}).",
            "Choose an empty or new folder with --out.",
        )
    return None


def _make_room(path: Path, room_bytes: int) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise _unusable(path, error) from error
    if free < room_bytes:
        raise RunError(
            f"{path} has {free >> 20} MiB of free space, the run needs {room_bytes >> 20} MiB.",
            "Free space or choose a folder on another disk with --out.",
        )


def _unusable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path} cannot be used as a run folder: {error.strerror or error}.",
        "Choose a folder you may write to with --out.",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
