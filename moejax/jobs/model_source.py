"""Where a job's model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moejax.checkpoint import Manifest, load_model, read_manifest
from moejax.core import CheckpointError, spec
from moejax.files import find_resource
from moejax.models import DecoderLM, parameters, retyped, with_parameters


@spec
class SavedModel:
    """A model folder: a path, or the name of a shipped model ("reference", "nano")."""

    path: str

    def load(self, stored: Any) -> DecoderLM:
        """The model in float32, its plain weights rounded to `stored`, in which it will be saved.

        CheckpointError as `load_model`.
        """
        rounded = load_model(self.folder(), dtype=stored)
        return with_parameters(rounded.spec, retyped(parameters(rounded), jnp.float32))

    def manifest(self) -> Manifest:
        """What the folder's model.json says; no weights are read."""
        return read_manifest(self.folder())

    def folder(self) -> Path:
        """The folder; a path in the working folder goes before a shipped name."""
        here = Path(self.path)
        if here.is_dir() or here.is_absolute() or len(here.parts) > 1:
            return here
        try:
            return find_resource("assets", self.path)
        except Exception as error:
            raise CheckpointError(
                f"there is no model folder {self.path!r}, and none of that name ships with moejax.",
                "Give the model/ folder of a training run, or 'reference', 'nano'.",
            ) from error
