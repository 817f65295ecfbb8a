"""The cache folder, and the content hashes that name what lies in it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """The folder for what can be fetched or computed again: $MOEJAX_CACHE or ~/.cache/moejax."""
    chosen = os.environ.get("MOEJAX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "moejax"


def sha256_of_file(path: Path | str) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(*parts: Any) -> str:
    """A sha256 over JSON-ready parts: equal parts give equal names, on every machine.

    Raises TypeError for a part that is not JSON, so that no object's address enters a name.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
