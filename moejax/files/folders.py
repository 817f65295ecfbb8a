"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moejax.core.errors import RunError


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes that name only if the block ends well.

    Raises RunError if something other than an empty folder has the name, or it cannot be written;
    nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise RunError(f"{path} is there already.", "Name a new folder, or remove that one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}.", "Choose another folder."
        ) from error
    try:
        yield made
        made.chmod(0o755)
        os.replace(made, path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
