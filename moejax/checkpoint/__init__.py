"""Saved models, training checkpoints, and models of other libraries' folders."""

from typing import TYPE_CHECKING, Any

# Folders of moejax
from moejax.checkpoint.manifest import (
    Manifest,
    load_model,
    load_spec,
    on_host,
    payload_bytes,
    read_manifest,
    save_model,
    spec_difference,
    stored_bytes,
)

# Folders of Hugging Face
from moejax.checkpoint.coverage import Coverage
from moejax.checkpoint.exporting import copy_beside, export_model, family_for
from moejax.checkpoint.families import families, family_of
from moejax.checkpoint.family import Family
from moejax.checkpoint.importing import Imported, import_model, read_config

# GGUF files
from moejax.checkpoint.gguf import gguf_spec, load_gguf

if TYPE_CHECKING:
    from moejax.checkpoint.train_state import TrainCheckpoints

__all__ = [
    "Coverage",
    "Family",
    "Imported",
    "Manifest",
    "TrainCheckpoints",
    "copy_beside",
    "export_model",
    "families",
    "family_for",
    "family_of",
    "gguf_spec",
    "import_model",
    "load_gguf",
    "load_model",
    "load_spec",
    "on_host",
    "payload_bytes",
    "read_config",
    "read_manifest",
    "save_model",
    "spec_difference",
    "stored_bytes",
]


def __getattr__(name: str) -> Any:
    # Orbax takes a second to import, and only training needs it.
    if name == "TrainCheckpoints":
        from moejax.checkpoint.train_state import TrainCheckpoints

        return TrainCheckpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
