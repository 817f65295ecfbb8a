"""Where a run goes when nobody says."""

from __future__ import annotations

from pathlib import Path


def run_folder(file: str) -> Path:
    """runs/<name of the config>; for the config.gin of a run folder, that folder itself."""
    path = Path(file)
    if path.name == "config.gin" and (path.parent / "run.json").is_file():
        return path.parent
    return Path("runs") / path.name.removesuffix(".gin")
