"""Where a job's model comes from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from moejax import weights
from moejax.checkpoint import Manifest, import_model, load_model, read_config, read_manifest
from moejax.core import CheckpointError, DataError, spec
from moejax.data import Tokenizer, folder_tokenizer, shipped_tokenizer
from moejax.files import content_hash, find_resource, open_tensors, sha256_of_file
from moejax.models import DecoderLM, abstract_model, parameters, retyped, with_parameters


@runtime_checkable
class ModelSource(Protocol):
    """Where a model comes from. path: what reports call it."""

    @property
    def path(self) -> str: ...

    def load(self, stored: Any) -> DecoderLM:
        """The model in float32, its plain weights rounded to `stored`, in which it will be saved.

        CheckpointError where it is missing, damaged or unsupported.
        """
        ...

    def manifest(self) -> Manifest:
        """What can be known without its weights."""
        ...

    def tokenizer(self) -> Tokenizer:
        """What its texts are cut by."""
        ...


@spec
class SavedModel:
    """A model folder: a path, or the name of a shipped model ("reference", "nano")."""

    path: str

    def load(self, stored: Any) -> DecoderLM:
        """CheckpointError as `load_model`."""
        return _widened(load_model(self.folder(), dtype=stored))

    def manifest(self) -> Manifest:
        """What the folder's model.json says; no weights are read."""
        return read_manifest(self.folder())

    def tokenizer(self) -> Tokenizer:
        """The one in the folder, or the one that ships with moejax, for models of its size.

        DataError for a model that came in without the tokenizer it was trained with.
        """
        folder = self.folder()
        if (folder / "tokenizer.json").is_file():
            return folder_tokenizer(folder)
        shipped, manifest = shipped_tokenizer(), self.manifest()
        foreign = "family" in manifest.facts and "tokenizer" not in manifest.facts
        if foreign or manifest.spec.vocab != shipped.vocab:
            raise DataError(
                f"{folder} has no tokenizer.json, and its vocabulary of {manifest.spec.vocab} is "
                "not that of the tokenizer that ships with moejax.",
                "Put the tokenizer.json of the model into the folder.",
            )
        return shipped

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


@spec
class ImportedModel:
    """A model folder as it is on Hugging Face's hub: config.json, safetensors, tokenizer.json."""

    path: str

    def load(self, stored: Any) -> DecoderLM:
        """CheckpointError as `import_model`."""
        return _widened(import_model(self.path, dtype=stored).model)

    def manifest(self) -> Manifest:
        """Spec and formats from config.json, the hash of all tensor files."""
        _, family, described, _ = read_config(self.path)
        named = parameters(abstract_model(described))
        tensors = open_tensors(self.path)
        facts: dict[str, Any] = {"family": family.name}
        if (Path(self.path) / "tokenizer.json").is_file():
            facts["tokenizer"] = self.tokenizer().sha256
        return Manifest(
            spec=described,
            formats={name: weights.format_meta(weight) for name, weight in named.items()},
            facts=facts,
            file=tensors.files[0].name if tensors.files else "",
            bytes=tensors.nbytes,
            sha256=_hash_of(tensors.files),
        )

    def tokenizer(self) -> Tokenizer:
        """The one in the folder; DataError if there is none."""
        return folder_tokenizer(self.path)


def _widened(rounded: DecoderLM) -> DecoderLM:
    """The model in float32, in which it is studied, with the values that it has."""
    return with_parameters(rounded.spec, retyped(parameters(rounded), jnp.float32))


@functools.lru_cache(maxsize=32)
def _hash_of(files: tuple[Path, ...]) -> str:
    return content_hash([sha256_of_file(path) for path in files])
