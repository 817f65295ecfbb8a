"""Token stores: a tokenised split on disk, one memory-mapped file per group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from moejax.core.atomic import atomic_file, read_json, write_json
from moejax.core.errors import DataError, RunError
from moejax.data.corpus import Corpus, Split
from moejax.data.tokenizer import Tokenizer
from moejax.files import cache_root, content_hash
from moejax.runs import progress

_LAYOUT = 1  # raises with the layout of the files; part of every store's name
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class GroupFacts:
    """What one group of a store holds; text_bytes: UTF-8 bytes, without end-of-document ids."""

    tokens: int
    documents: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token that stands for text."""
        return self.text_bytes / max(1, self.tokens - self.documents)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A split of a corpus as tokens: documents in order, an end-of-document id after each.

    fingerprint: a hash of corpus, tokenizer and split; stores with equal fingerprints are equal.
    """

    folder: Path
    split: Split
    facts: Mapping[str, GroupFacts]
    dtype: np.dtype
    vocab: int
    end_of_document: int
    fingerprint: str

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups in the corpus's order."""
        return tuple(self.facts)

    def tokens(self, group: str) -> np.ndarray:
        """The ids of a group [n], mapped from disk: only what is indexed is read."""
        if group not in self.facts:
            raise DataError(
                f"the token store has no group {group!r}.", f"It holds {', '.join(self.groups)}."
            )
        if not self.facts[group].tokens:
            return np.zeros(0, self.dtype)
        return np.memmap(self.folder / f"{group}.bin", self.dtype, mode="r")


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, split: Split = "train", cache: Path | str | None = None
) -> TokenStore:
    """The token store of a corpus's split, from the cache where it holds one.

    It lies under a hash of corpus, tokenizer, end of document and split. A group is written whole
    or not at all, so that an interrupted call goes on with the group it was at.
    """
    end = tokenizer.end_of_document
    name = content_hash(_LAYOUT, corpus.fingerprint, tokenizer.sha256, end, split)
    folder = Path(cache or cache_root()) / "tokens" / name[:24]
    facts = {}
    for group in corpus.groups:
        known = _known_facts(folder, group, tokenizer.dtype)
        facts[group] = known or _tokenize_group(corpus, tokenizer, group, split, folder)
    return TokenStore(folder, split, facts, tokenizer.dtype, tokenizer.vocab, end, name)


def _known_facts(folder: Path, group: str, dtype: np.dtype) -> GroupFacts | None:
    """The facts of a group that lies in the cache, None unless its tokens are all there."""
    try:
        facts = GroupFacts(**read_json(folder / f"{group}.json"))
        size = (folder / f"{group}.bin").stat().st_size
    except (RunError, OSError, TypeError):
        return None
    return facts if size == facts.tokens * dtype.itemsize else None


def _tokenize_group(
    corpus: Corpus, tokenizer: Tokenizer, group: str, split: Split, folder: Path
) -> GroupFacts:
    tokens = documents = text_bytes = 0
    with (
        atomic_file(folder / f"{group}.bin") as file,
        progress(None, f"tokenise {group} ({split})", "B") as bar,
    ):
        for texts, size in _chunks(corpus.documents(group, split)):
            ids = tokenizer.encode_documents(texts)
            file.write(ids.tobytes())
            tokens, documents = tokens + len(ids), documents + len(texts)
            text_bytes += size
            bar.advance(size)
    facts = GroupFacts(tokens, documents, text_bytes)
    write_json(folder / f"{group}.json", dataclasses.asdict(facts))
    return facts


def _chunks(texts: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """Lists of texts of about a megabyte with their size in bytes: enough for all cores."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text.encode())
        if size >= _CHUNK_BYTES:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size
