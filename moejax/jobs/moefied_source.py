"""Dense models cut into experts, wherever a config names a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from moejax import weights
from moejax.checkpoint import Manifest
from moejax.core import check_that, spec, to_json
from moejax.data import Tokenizer
from moejax.files import content_hash
from moejax.jobs.model_source import ModelSource
from moejax.models import DecoderLM, abstract_model, parameters, retyped, with_parameters
from moejax.upcycle import BalancedKMeans, CentreRouting, RouterStart, Split, moefied_spec, moefy


@spec
class MoEfied:
    """A dense model with each feed-forward split into `experts`, `top_k` of them on.

    split: which neurons go together. start: how tokens choose. seed: of splits that draw.
    """

    model: ModelSource
    experts: int
    top_k: int
    split: Split = BalancedKMeans()
    start: RouterStart = CentreRouting()
    seed: int = 0

    def check(self) -> None:
        check_that(self.experts >= 1, self, "experts", "It must be at least 1.")
        check_that(
            1 <= self.top_k <= self.experts, self, "top_k", f"Give 1 to experts = {self.experts}."
        )

    @property
    def path(self) -> str:
        """The dense model's, and how it is cut."""
        how = f"{type(self.split).__name__}, {type(self.start).__name__}"
        return f"{self.model.path} MoEfied, {self.top_k} of {self.experts} on ({how})"

    def load(self, stored: Any) -> DecoderLM:
        """Errors as those of the dense model and of `moefy`."""
        dense = self.model.load(stored)
        how: dict[str, Any] = {"split": self.split, "start": self.start, "seed": self.seed}
        moe = moefy(dense, self.experts, self.top_k, **how)
        rounded = retyped(retyped(parameters(moe), stored), jnp.float32)
        return with_parameters(moe.spec, rounded)

    def manifest(self) -> Manifest:
        """The dense model's, with this spec; the hash is of its hash and of how it is cut."""
        dense = self.model.manifest()
        described = moefied_spec(dense.spec, self.experts, self.top_k, start=self.start)
        named = parameters(abstract_model(described))
        formats = {name: weights.format_meta(weight) for name, weight in named.items()}
        kept = {name: meta for name, meta in dense.formats.items() if name in formats}
        return dataclasses.replace(
            dense,
            spec=described,
            formats=formats | kept,
            sha256=content_hash(dense.sha256, to_json(self)),
        )

    def tokenizer(self) -> Tokenizer:
        """The dense model's."""
        return self.model.tokenizer()
