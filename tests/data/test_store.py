"""Token stores: made once, found again, never half made."""

import numpy as np
import pytest
import tokenizers

from moejax.core.errors import DataError
from moejax.data import Tokenizer, shipped_tokenizer, tokenize_corpus, train_tokenizer

TEXTS = {"one": ["alpha beta", "gamma"], "two": ["δέλτα " * 50], "empty": []}
TOKENIZER = shipped_tokenizer()


def test_store_holds_the_documents_in_order(texts_corpus, tmp_path):
    """Catches documents that run into each other, and facts that count characters for bytes."""
    store = tokenize_corpus(texts_corpus(TEXTS), TOKENIZER, "train", tmp_path)
    assert store.groups == ("one", "two", "empty")
    ids = store.tokens("one")
    assert TOKENIZER.decode(ids) == "alpha beta<|endoftext|>gamma<|endoftext|>"
    facts = store.facts["two"]
    assert (facts.documents, facts.text_bytes) == (1, len(TEXTS["two"][0].encode()))
    assert facts.bytes_per_token == facts.text_bytes / (facts.tokens - 1)
    assert len(store.tokens("empty")) == 0
    with pytest.raises(DataError, match="no group 'three'"):
        store.tokens("three")


def test_second_call_reads_the_cache(texts_corpus, tmp_path):
    """Catches a store that is made again, or that is found under another corpus's name."""
    corpus = texts_corpus(TEXTS)
    first = tokenize_corpus(corpus, TOKENIZER, "train", tmp_path)
    reads = corpus.reads
    again = tokenize_corpus(corpus, TOKENIZER, "train", tmp_path)
    assert corpus.reads == reads and again == first
    other = texts_corpus({"one": ["other"]}, fingerprint="other")
    assert tokenize_corpus(other, TOKENIZER, "train", tmp_path).folder != first.folder
    small = train_tokenizer(["alpha"] * 3, vocab=258)
    assert tokenize_corpus(corpus, small, "train", tmp_path).folder != first.folder
    assert tokenize_corpus(corpus, TOKENIZER, "valid", tmp_path).fingerprint != first.fingerprint


def test_documents_that_end_with_another_token_lie_elsewhere(texts_corpus, tmp_path):
    """Catches a model's tokens read by its chat variant, whose documents end otherwise: both have
    the same vocabulary and merges."""
    bpe = tokenizers.Tokenizer.from_str(TOKENIZER._bpe.to_str())
    bpe.add_special_tokens(["a"])  # in the vocabulary already
    ends = "<|endoftext|>", "a"
    kinds = [Tokenizer(bpe, end) for end in ends]
    assert kinds[0].sha256 == kinds[1].sha256
    found = [tokenize_corpus(texts_corpus({"one": ["xyz"]}), k, "train", tmp_path) for k in kinds]
    for store, kind in zip(found, kinds, strict=True):
        assert store.tokens("one")[-1] == kind.end_of_document == store.end_of_document
    assert kinds[0].end_of_document != kinds[1].end_of_document


def test_interrupted_group_leaves_nothing_and_the_others_stay(texts_corpus, tmp_path):
    """Catches a cut-off token file that the next call takes for whole, and work done twice."""
    corpus = texts_corpus(TEXTS)
    whole = tokenize_corpus(corpus, TOKENIZER, "train", tmp_path / "whole")

    def documents(group, split):
        if group == "two":
            raise KeyboardInterrupt
        return iter(TEXTS[group])

    corpus.documents = documents
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(corpus, TOKENIZER, "train", tmp_path / "cut")
    left = sorted(p.name for p in (tmp_path / "cut").rglob("*") if p.is_file())
    assert left == ["one.bin", "one.json"]
    resumed = texts_corpus(TEXTS)
    store = tokenize_corpus(resumed, TOKENIZER, "train", tmp_path / "cut")
    assert resumed.reads == 2
    np.testing.assert_array_equal(store.tokens("two"), whole.tokens("two"))


def test_damaged_tokens_are_made_again(texts_corpus, tmp_path):
    """Catches a token file cut by a full disk that is read as if it were whole."""
    corpus = texts_corpus(TEXTS)
    store = tokenize_corpus(corpus, TOKENIZER, "train", tmp_path)
    expected = store.tokens("one").tolist()
    (store.folder / "one.bin").write_bytes(b"\0\0")
    assert tokenize_corpus(corpus, TOKENIZER, "train", tmp_path).tokens("one").tolist() == expected
