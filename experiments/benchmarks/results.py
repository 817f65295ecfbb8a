"""What runs found, in one JSON file: a later run replaces the rows it measured, and no others."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Run = dict[str, Any]

_PACKAGES = ("jax", "jaxlib", "libtpu", "tokamax", "qwix", "torch", "transformers")
_KEY = ("chip", "case", "shape", "sizes", "contender", "over")


def record(path: Path, command: str, rows: Iterable[Row], **facts: Any) -> None:
    """Prints rows as they come and merges each into the file, so that a run may be cut short."""
    run: Run = {"command": command, "commit": commit(), "versions": versions(), **facts}
    for row in rows:
        print("  ".join(str(value) for value in row.values()), flush=True)
        path.write_text(json.dumps({"runs": merged(load(path), run, row)}, indent=1) + "\n")


def load(path: Path) -> list[Run]:
    """The runs in a file, the oldest first; none where there is no file."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def rows_of(runs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of all runs."""
    return [row for run in runs for row in run["rows"]]


def merged(runs: Iterable[Run], run: Run, row: Row) -> list[Run]:
    """`runs` with the row in `run`, and nowhere else what an older run has for the same thing.

    Runs that agree in all but their rows are one; a run without rows goes.
    """
    kept: list[Run] = []
    home = None
    for other in runs:
        rows = [old for old in other["rows"] if _key(old) != _key(row)]
        kept.append({**other, "rows": rows})
        if {**other, "rows": None} == {**run, "rows": None}:
            home = kept[-1]
    if home is None:
        home = {**run, "rows": []}
        kept.append(home)
    home["rows"].append(row)
    return [one for one in kept if one["rows"]]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)


def versions() -> dict[str, str]:
    """Of the packages that are compared, those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that is checked out; "+" where tracked files differ from it."""
    try:
        git = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
