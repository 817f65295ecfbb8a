"""Model folders of safetensors shards, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moejax.files import write_safetensors

INDEX = "model.safetensors.index.json"


def shards(folder: Path, *parts: Mapping[str, np.ndarray]) -> Path:
    """A folder with one file per part and an index of all."""
    place = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, part)
        place |= dict.fromkeys(part, file)
    write_index(folder, place)
    return folder


def write_index(folder: Path, place: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(place)}))


def index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]
