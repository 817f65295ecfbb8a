"""Byte-level BPE on the `tokenizers` library: every text has tokens, and comes back unchanged."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.core.atomic import write_atomically
from moejax.core.errors import DataError
from moejax.data.corpus import Corpus, Split
from moejax.files import content_hash, find_resource

END_OF_DOCUMENT = "<|endoftext|>"
SHIPPED = "tokenizer/tokenizer.json"
_BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
}  # fmt: skip
"""The cut of `train_tokenizer`; hashes of old models know of no other."""


class Tokenizer:
    """Text to token ids and back. Ids are uint16, or uint32 where the vocabulary needs it.

    vocab: number of ids. end_of_document: the id that ends every document; no text encodes to it,
    not even text that spells it out. end_token: how it is written.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, end_of_document: str = END_OF_DOCUMENT):
        """bpe: a tokenizer of the library; DataError if it has no end-of-document token."""
        end = bpe.token_to_id(end_of_document)
        if end is None:
            raise DataError(
                f"the tokenizer has no token {end_of_document!r}.",
                "Train it with moejax.data.train_tokenizer, or add the token.",
            )
        bpe.encode_special_tokens = True  # special tokens in a text are text
        self._bpe = bpe
        self.end_of_document: int = end
        self.end_token = end_of_document
        self.vocab: int = bpe.get_vocab_size()
        self.dtype = np.dtype(np.uint16 if self.vocab <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """The ids [n] of a text, without an end-of-document id.

        Raises DataError for a byte that the tokenizer has no token for.
        """
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        return self._without_unknown(np.asarray(ids, self.dtype), text)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of all texts in one array, an end-of-document id after each; in parallel.

        Raises DataError as `encode`.
        """
        encodings = self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)
        end = np.asarray([self.end_of_document], self.dtype)
        ids = [np.zeros(0, self.dtype)]
        for text, encoding in zip(texts, encodings, strict=True):
            ids += [self._without_unknown(np.asarray(encoding.ids, self.dtype), text), end]
        return np.concatenate(ids)

    def decode(self, tokens: np.ndarray | Sequence[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self._bpe.decode([int(token) for token in tokens], skip_special_tokens=False)

    def _without_unknown(self, ids: np.ndarray, text: str) -> np.ndarray:
        """The ids of `text`; no text spells the end of a document, so there it means unknown."""
        if np.any(ids == self.end_of_document):
            unknown = next(c for c in text if self.end_of_document in self._bpe.encode(c).ids)
            raise DataError(
                f"the text holds {unknown!r}, for which the tokenizer has no token.",
                "Leave the character out, or use a tokenizer with all 256 bytes.",
            )
        return ids

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of vocabulary, merges and how a text is cut before: two tokenizers with equal
        hashes give a text equal ids. Which of them ends a document is not in it."""
        whole = json.loads(self._bpe.to_str())
        model, cut = whole["model"], [whole["normalizer"], whole["pre_tokenizer"]]
        plain = cut == [None, _BYTE_LEVEL]
        if "merges" not in model:  # no BPE
            return content_hash(model, *cut)
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        return content_hash(model["vocab"], merges, *([] if plain else cut))

    def save(self, path: Path | str) -> None:
        """Writes the tokenizer in the library's JSON format, whole or not at all."""
        write_atomically(path, self._bpe.to_str() + "\n")

    @classmethod
    def load(cls, path: Path | str, end_of_document: str = END_OF_DOCUMENT) -> Tokenizer:
        """The tokenizer in a JSON file; DataError if it is missing or damaged."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls(tokenizers.Tokenizer.from_str(text), end_of_document)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"{path} is no tokenizer: {error}.", "Give a file written by Tokenizer.save."
            ) from error


def shipped_tokenizer() -> Tokenizer:
    """The tokenizer of the reference models: 4096 ids, trained on all groups in equal parts."""
    return Tokenizer.load(find_resource("assets", SHIPPED))


def train_tokenizer(texts: Iterable[str], vocab: int = 4096) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` ids, end of document first (id 0), then the 256 bytes.

    Raises DataError if the texts are too few for so many ids.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab:
        raise DataError(
            f"the texts give {bpe.get_vocab_size()} tokens, vocab = {vocab} was asked for.",
            "Give more text, or a vocab of at least 257 and at most that.",
        )
    return Tokenizer(bpe)


def balanced_texts(corpus: Corpus, byte_count: int, split: Split = "train") -> Iterator[str]:
    """The first `byte_count` bytes of documents of each group: equal parts for training BPE."""
    for group in corpus.groups:
        taken = 0
        for text in corpus.documents(group, split):
            yield text
            taken += len(text.encode())
            if taken >= byte_count:
                break
