"""One pass over held-out text for any number of models."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.core import ConfigError, DataError, MoejaxError, processes
from moejax.data import EvalBatch
from moejax.evaluate.scores import Scores, domain_score, pooled, window_sums
from moejax.evaluate.token_scores import compare, predict, score
from moejax.models import DecoderLM
from moejax.moe import Parallel
from moejax.runs import Progress


def evaluate(
    models: Mapping[str, DecoderLM],
    batches: Iterable[EvalBatch],
    *,
    base: Mapping[str, str | None],
    group_bytes: Mapping[str, int],
    dtype: Any = jnp.float32,
    progress: Progress | None = None,
    parallel: Parallel | None = None,
) -> dict[str, Scores]:
    """Scores of every arm on the same text, read once.

    models: arm -> model. base: arm -> the arm it is compared with, None or absent for none.
    group_bytes: bytes of each group's text. dtype: of activations. progress: advances by one per
    batch and arm. parallel: the mesh on which all models lie, and their strategy; None for one
    device. Several processes call this together with the same text and get the same scores.

    A row of a batch is a window. Its sums are taken on the device, and of the logits nothing else
    outlives the batch; within it, those of arms that others are compared with are kept. Results do
    not depend on the batch size or on padding, beyond what a compiler does to a matrix product of
    another shape; with a dispatch that drops tokens, a model itself depends on its batch.
    Tokens per second leave out the first batch, which compiles, and include the scoring.

    Raises ConfigError for a base that is no other arm; DataError for text without tokens, of a
    group without bytes, or with ids outside the vocabulary; MoejaxError for a score that is not
    finite.
    """
    _check_arms(models, base)
    arms = {name: _Arm(name, model, base.get(name), parallel) for name, model in models.items()}
    compared = [name for name in models if name in base.values()]
    order = compared + [name for name in models if name not in compared]
    for number, batch in enumerate(batches):
        _check_batch(batch, number, group_bytes, arms)
        held = {name: arms[name].logits(batch, dtype) for name in compared}
        for name in order:
            arm = arms[name]
            logits = held[name] if name in held else arm.logits(batch, dtype)
            arm.score(batch, number, logits, held[arm.base] if arm.base else None)
            if progress is not None:
                progress.advance(1, arm=name)
    return {name: arm.scores(group_bytes) for name, arm in arms.items()}


class _Arm:
    """A model and what is known of it so far."""

    def __init__(self, name: str, model: DecoderLM, base: str | None, parallel: Parallel | None):
        self.name, self.base, self.vocab = name, base, model.spec.vocab
        self.parallel = parallel
        self.graphdef, self.state = nnx.split(model)
        self.sums: dict[str, dict[str, list[np.ndarray]]] = {}
        self.assignments: dict[str, tuple[np.ndarray | None, ...]] = {}
        self.steps: list[tuple[str, int, float]] = []  # group, tokens, seconds
        self.spent = 0.0  # seconds on logits that were not scored yet

    def logits(self, batch: EvalBatch, dtype: Any) -> jax.Array:
        start = time.perf_counter()
        text = batch.tokens_BxS, batch.mask_BxS
        logits, counts = predict(self.graphdef, self.state, *text, dtype, self.parallel)
        logits.block_until_ready()
        fresh = tuple(c if c is None else np.asarray(c, np.int64) for c in processes.fetch(counts))
        before = self.assignments.get(batch.group)
        self.assignments[batch.group] = fresh if before is None else _added(before, fresh)
        self.spent = time.perf_counter() - start
        return logits

    def score(
        self, batch: EvalBatch, number: int, logits: jax.Array, base: jax.Array | None
    ) -> None:
        start = time.perf_counter()
        if base is None:
            found = score(logits, batch.targets_BxS, batch.mask_BxS, self.parallel)
        else:
            found = compare(base, logits, batch.targets_BxS, batch.mask_BxS, self.parallel)
        sums = {name: np.asarray(v, np.float64) for name, v in processes.fetch(found).items()}
        seconds = self.spent + time.perf_counter() - start
        for name, value_B in sums.items():
            bad = np.flatnonzero(~np.isfinite(value_B))
            if bad.size:
                raise MoejaxError(
                    f"arm {self.name!r}: {name} is {value_B[bad[0]]} in window {bad[0]} of batch "
                    f"{number} (group {batch.group!r}).",
                    "Its logits overflow or hold NaN: check its weights and the pass that made it.",
                )
        tokens_B = np.sum(batch.mask_BxS, axis=1)
        columns = self.sums.setdefault(batch.group, {})
        for name, value_B in {"tokens": tokens_B.astype(np.float64), **sums}.items():
            columns.setdefault(name, []).append(value_B[tokens_B > 0])
        self.steps.append((batch.group, int(tokens_B.sum()), seconds))

    def scores(self, group_bytes: Mapping[str, int]) -> Scores:
        windows = {
            group: window_sums({name: np.concatenate(parts) for name, parts in columns.items()})
            for group, columns in self.sums.items()
        }
        if not windows:
            raise DataError("there is no text to evaluate on.", "Give at least one batch.")
        for group, sums in windows.items():
            if not sums.tokens.size:
                raise DataError(f"the text of group {group!r} holds no token.", "Leave it out.")
        return Scores(
            domains=tuple(
                domain_score(group, group_bytes[group], sums, self._rate({group}))
                for group, sums in windows.items()
            ),
            average=pooled(windows, group_bytes, self._rate(set(windows))),
            windows=windows,
            assignments=self.assignments,
            seconds=sum(seconds for *_, seconds in self.steps),
        )

    def _rate(self, groups: set[str]) -> float | None:
        timed = [(tokens, s) for group, tokens, s in self.steps[1:] if group in groups]
        return sum(tokens for tokens, _ in timed) / sum(s for _, s in timed) if timed else None


def _added(a: tuple[np.ndarray | None, ...], b: tuple[np.ndarray | None, ...]) -> tuple:
    return tuple(None if x is None or y is None else x + y for x, y in zip(a, b, strict=True))


def _check_arms(models: Mapping[str, DecoderLM], base: Mapping[str, str | None]) -> None:
    names = ", ".join(models) or "none"
    for arm, other in base.items():
        if arm not in models:
            raise ConfigError(f"`base` names the arm {arm!r}.", f"The arms are {names}.")
        if other is None:
            continue
        if other not in models or other == arm:
            raise ConfigError(
                f"arm {arm!r} is to be compared with {other!r}.",
                f"Compare it with another arm ({names}) or with None.",
            )
        mine, theirs = models[arm].spec.vocab, models[other].spec.vocab
        if mine != theirs:
            raise ConfigError(
                f"arm {arm!r} has a vocabulary of {mine}, its base {other!r} one of {theirs}.",
                "Compare models of one tokenizer.",
            )


def _check_batch(
    batch: EvalBatch, number: int, group_bytes: Mapping[str, int], arms: Mapping[str, _Arm]
) -> None:
    if group_bytes.get(batch.group, 0) <= 0:
        raise DataError(
            f"batch {number} is of group {batch.group!r}, whose size in bytes is not known.",
            f"Give it in group_bytes, which has {', '.join(group_bytes) or 'none'}.",
        )
    vocab = min((arm.vocab for arm in arms.values()), default=0)
    for ids in (batch.tokens_BxS, batch.targets_BxS):
        if np.size(ids) and not 0 <= np.min(ids) <= np.max(ids) < vocab:
            raise DataError(
                f"batch {number} (group {batch.group!r}) holds token ids from {np.min(ids)} to "
                f"{np.max(ids)}, the vocabulary has {vocab}.",
                "Evaluate on text of the model's own tokenizer.",
            )
