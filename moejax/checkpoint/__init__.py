"""Saved models and training checkpoints."""

from typing import TYPE_CHECKING, Any

from moejax.checkpoint.gguf import gguf_spec, load_gguf
from moejax.checkpoint.manifest import (
    Manifest,
    load_model,
    load_spec,
    payload_bytes,
    read_manifest,
    save_model,
    spec_difference,
    stored_bytes,
)

if TYPE_CHECKING:
    from moejax.checkpoint.train_state import TrainCheckpoints

__all__ = [
    "Manifest",
    "TrainCheckpoints",
    "gguf_spec",
    "load_gguf",
    "load_model",
    "load_spec",
    "payload_bytes",
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
