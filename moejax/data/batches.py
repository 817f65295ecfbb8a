"""Training batches: a fixed mixture of groups in a seeded order, resumable at any step."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.core.errors import DataError
from moejax.data.corpus import Split
from moejax.data.store import TokenStore
from moejax.files import content_hash

_GOLDEN = (math.sqrt(5) - 1) / 2


class Batch(NamedTuple):
    """Rows of text. tokens_BxS1: int32 [B, S + 1], inputs and the token after each.

    group_B: int32, the group of each row as an index into `Batches.groups`.
    """

    tokens_BxS1: np.ndarray
    group_B: np.ndarray

    @property
    def inputs_BxS(self) -> np.ndarray:
        """What the model reads."""
        return self.tokens_BxS1[:, :-1]

    @property
    def targets_BxS(self) -> np.ndarray:
        """What it predicts at each place."""
        return self.tokens_BxS1[:, 1:]


class Batches:
    """An endless iterator of batches whose order depends on its arguments and nothing else.

    Step t takes its rows' groups by systematic sampling: every batch holds each group's share to
    within one row, and all batches together hold it exactly. A group's sequences of `length` tokens
    are visited once per epoch in a seeded order, cut at a place that moves from epoch to epoch.
    """

    def __init__(
        self,
        store: TokenStore,
        batch: int,
        length: int,
        mixture: Mapping[str, float] | None = None,
        seed: int = 0,
        split: Split = "train",
        rows: Sequence[int] | None = None,
    ):
        """batch: rows B. length: tokens S that a row predicts. mixture: shares, equal when None.

        rows: the rows of each batch that are read here, in ascending order, None for all. What is
        in a row depends on no such choice, nor does the position: processes that read different
        rows of one batch stay together.

        Raises DataError if shares do not sum to 1, a group holds less than its rows of one batch,
        or the store holds another split than `split`.
        """
        if store.split != split:
            raise DataError(
                f"the token store holds split {store.split!r}, the batches want {split!r}.",
                "Tokenise that split.",
            )
        if batch < 1 or length < 1 or seed < 0:
            raise DataError(
                f"batch = {batch}, length = {length}, seed = {seed} give no batches.",
                "Batch and length are at least 1, the seed at least 0.",
            )
        shares = _checked_mixture(store, mixture)
        self._store, self._batch, self._length, self._seed = store, batch, length, seed
        self._rows = np.arange(batch) if rows is None else np.asarray(rows, np.int64)
        self.groups: tuple[str, ...] = tuple(shares)
        self._cumulative = np.cumsum(list(shares.values()))[:-1]
        self._windows = {g: store.facts[g].tokens // length - 1 for g in shares}
        for group, share in shares.items():
            if self._windows[group] < math.ceil(share * batch):
                raise DataError(
                    f"group {group!r} has {store.facts[group].tokens} tokens, too few "
                    f"for the {math.ceil(share * batch)} rows of {length} tokens in each batch.",
                    "Give it more text, or use a smaller batch, length or share.",
                )
        self._identity = content_hash(store.fingerprint, batch, length, shares, seed)[:24]
        self._step = 0
        self._rows_read = dict.fromkeys(self.groups, 0)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        group_B = self._groups_of_step(self._step)
        here_B = np.zeros(self._batch, bool)
        here_B[self._rows] = True
        tokens_BxS1 = np.empty((self._batch, self._length + 1), np.int32)
        for index, group in enumerate(self.groups):
            rows = np.flatnonzero(group_B == index)
            if len(rows):
                tokens_BxS1[rows[here_B[rows]]] = self._sequences(group, here_B[rows])
        self._step += 1
        return Batch(tokens_BxS1[self._rows], group_B[self._rows])

    def state(self) -> dict[str, Any]:
        """The position before the next batch, as JSON-ready data."""
        return {
            "identity": self._identity,
            "step": self._step,
            "rows_read": dict(self._rows_read),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `state` gave; the batches from there are the same as then.

        Raises DataError if it was taken with other data, shapes, mixture or seed.
        """
        if state.get("identity") != self._identity:
            raise DataError(
                "the position belongs to another corpus, tokenizer, batch shape, mixture or seed.",
                "Resume with the configuration the run was started with.",
            )
        self._step = int(state["step"])
        self._rows_read = {group: int(state["rows_read"][group]) for group in self.groups}

    def epochs(self) -> dict[str, float]:
        """How often each group was read so far."""
        return {group: self._rows_read[group] / self._windows[group] for group in self.groups}

    def _groups_of_step(self, step: int) -> np.ndarray:
        """The group of each row [B]: evenly spaced points under the shares, in a seeded row order.

        The offset runs through the golden-ratio sequence, so that shares hold over few steps too.
        The row order mixes groups, because a device may get a block of rows.
        """
        offset = (step * _GOLDEN) % 1.0
        points = (np.arange(self._batch) + offset) / self._batch
        group_B = np.searchsorted(self._cumulative, points, side="right").astype(np.int32)
        return group_B[_permutation(self._batch, self._seed, step)]

    def _sequences(self, group: str, here_N: np.ndarray) -> np.ndarray:
        """The next N sequences of a group, int32 [sum(here), S + 1]: those that are read here."""
        windows = self._windows[group]
        read = self._rows_read[group] + np.flatnonzero(here_N)
        self._rows_read[group] += len(here_N)
        starts = np.empty(len(read), np.int64)
        for epoch in np.unique(read // windows):
            here = read // windows == epoch
            order, offset = self._epoch(group, int(epoch))
            starts[here] = offset + order[read[here] % windows] * self._length
        return self._store.tokens(group)[starts[:, None] + np.arange(self._length + 1)]

    def _epoch(self, group: str, epoch: int) -> tuple[np.ndarray, int]:
        """The order of a group's windows in an epoch, and the place where the first one starts."""
        return _epoch_order(self._windows[group], self._length, self._seed, group, epoch)


@functools.lru_cache(maxsize=16)
def _epoch_order(
    windows: int, length: int, seed: int, group: str, epoch: int
) -> tuple[np.ndarray, int]:
    name = int(content_hash(group)[:8], 16)
    return _permutation(windows, seed, name, epoch), (epoch * (length // 2 + 1)) % length


def _permutation(count: int, *seeds: int) -> np.ndarray:
    """A permutation of range(count) by sorting raw PCG64 draws, which no NumPy release changes."""
    draws = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)
    return np.argsort(draws, kind="stable")


def _checked_mixture(store: TokenStore, mixture: Mapping[str, float] | None) -> dict[str, float]:
    """The shares above 0; DataError if they are no mixture of the store's groups."""
    if mixture is None:
        return dict.fromkeys(store.groups, 1 / len(store.groups))
    if unknown := sorted(set(mixture) - set(store.groups)):
        raise DataError(
            f"mixture names group {unknown[0]!r}, which the data does not have.",
            f"Its groups are {', '.join(store.groups)}.",
        )
    if min(mixture.values(), default=0) < 0 or abs(sum(mixture.values()) - 1) > 1e-6:
        raise DataError(
            f"mixture = {dict(mixture)} sums to {sum(mixture.values()):g} or has a negative share.",
            "Give shares of at least 0 that sum to 1.",
        )
    return {group: mixture[group] for group in store.groups if mixture.get(group, 0) > 0}
