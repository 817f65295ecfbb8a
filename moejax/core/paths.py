"""Folders on this machine's disks and in buckets."""

from __future__ import annotations

from pathlib import Path

from etils import epath

from moejax.core.errors import RunError

Folder = Path | epath.Path


def folder_of(path: Folder | str) -> Folder:
    """An absolute path: of `pathlib` on a disk, of `epath` where it names a store, as gs:// does.

    Raises RunError for a store that this machine has no access to, before anything is read.
    """
    if "://" not in str(path):
        return Path(path).absolute()
    try:
        found = epath.Path(path)
        found.exists()
    except Exception as error:  # each store has errors of its own
        raise RunError(
            f"{path} cannot be reached: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "gs:// wants the package gcsfs and credentials; or mount the bucket as a folder.",
        ) from error
    return found
