"""Corpora: groups of documents in three splits that share no document."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from moejax.core.errors import DataError

Split = Literal["train", "valid", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "valid", "heldout")
HELDOUT_BYTES = 262_144
"""Evaluation text per group: fixed, because bits per byte of a compressor depend on the size."""


class Document(NamedTuple):
    """One text and where it comes from; `unit` is what the split may not cut through."""

    path: str
    text: str
    unit: str


@runtime_checkable
class Corpus(Protocol):
    """Groups of documents; no document, nor a copy of it, is in two splits.

    fingerprint: a hash of everything that decides the documents, so that what is computed from them
    can be cached under it.
    """

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the documents and their splits."""
        ...

    def documents(self, group: str, split: Split) -> Iterator[str]:
        """The documents of a group's split, always in the same order."""
        ...


def split_of(unit: str, share: float) -> Split:
    """The split of a unit: `share` of all units each for valid and held-out, the rest for training.

    A stable hash of the name decides, so that a unit keeps its split when others come or go.
    """
    place = _place(unit)
    if place < share:
        return "heldout"
    return "valid" if place < 2 * share else "train"


def in_stable_order(documents: Iterable[Document]) -> list[Document]:
    """The documents in an order that mixes their sources and depends on their paths alone."""
    return sorted(documents, key=lambda document: (_place(f"order/{document.path}"), document.path))


def heldout_documents(
    corpus: Corpus,
    group: str,
    byte_count: int = HELDOUT_BYTES,
    split: Split = "heldout",
    *,
    first: int = 0,
) -> tuple[str, ...]:
    """Documents of a group's split that take `byte_count` bytes, a newline after each: those from
    number `first` on.

    The last document is cut at the end of a line, so that the text is at most `byte_count` bytes.
    Raises DataError if the group holds less than 99 % of `byte_count`.
    """
    taken, room = [], byte_count
    for text in itertools.islice(corpus.documents(group, split), first, None):
        size = len(text.encode()) + 1
        if size > room:
            taken += [lines] if (lines := _whole_lines(text, room - 1)) else []
            break
        taken.append(text)
        room -= size
    else:
        if room > byte_count // 100:
            raise DataError(
                f"group {group!r} has {byte_count - room} bytes of held-out text, "
                f"{byte_count} were asked for.",
                "Ask for fewer bytes or hold out a larger share.",
            )
    return tuple(taken)


def heldout_text(corpus: Corpus, group: str, byte_count: int = HELDOUT_BYTES) -> str:
    """The evaluation text of a group: `heldout_documents` with a newline after each.

    As tokens, that newline is the end-of-document token (`encode_documents`), so that bits per byte
    of a model and of a compressor are over the same bytes.
    """
    return "".join(f"{text}\n" for text in heldout_documents(corpus, group, byte_count))


def check_group(corpus: Corpus, group: str) -> None:
    """Raises DataError, naming the groups there are, if `group` is not one of them."""
    if group not in corpus.groups:
        raise DataError(
            f"{type(corpus).__name__} has no group {group!r}.",
            f"Its groups are {', '.join(corpus.groups)}.",
        )


def _whole_lines(text: str, room: int) -> str:
    """The longest run of whole lines of `text` that takes at most `room` bytes."""
    cut = text.encode()[: max(room, 0) + 1]
    return cut[: cut.rfind(b"\n")].decode() if b"\n" in cut else ""


def _place(name: str) -> float:
    """A number in [0, 1) from a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
