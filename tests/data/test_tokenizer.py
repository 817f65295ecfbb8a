"""The tokenizer: any text comes back, and no text spells the end of a document."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.core.errors import DataError
from moejax.data import (
    END_OF_DOCUMENT,
    Tokenizer,
    balanced_texts,
    shipped_tokenizer,
    train_tokenizer,
)

SHIPPED = shipped_tokenizer()


@given(text=st.text(max_size=60))
@example(text=f"a{END_OF_DOCUMENT}b")
@example(text="  leading\r\n\ttab\x00 日本 🙂 ﷽ é e\u0301")
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(text):
    """Catches normalisation, a space put in front, unknown tokens and lost control characters."""
    ids = SHIPPED.encode(text)
    assert SHIPPED.decode(ids) == text
    assert SHIPPED.end_of_document not in ids
    assert ids.dtype == np.uint16


def test_documents_end_with_the_end_token():
    """Catches a lost end, an end in front, and a parallel encode that reorders documents."""
    texts = [f"document {i}" for i in range(50)]
    ids = SHIPPED.encode_documents(texts)
    ends = np.flatnonzero(ids == SHIPPED.end_of_document)
    assert len(ends) == 50 and ends[-1] == len(ids) - 1
    assert [SHIPPED.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]] == texts
    assert len(SHIPPED.encode_documents([])) == 0


def test_shipped_tokenizer_is_the_one_the_models_were_trained_with():
    """Catches a tokenizer that is trained anew without a word: token ids of old models change."""
    assert (SHIPPED.vocab, SHIPPED.end_of_document) == (4096, 0)
    assert SHIPPED.sha256 == SHIPPED_SHA256


def test_trained_tokenizer_saves_and_loads(tmp_path):
    """Catches special tokens that work until the file is read back, and a hash of the layout."""
    trained = train_tokenizer(["the cat sat on the mat, the cat sat down"] * 5, vocab=270)
    assert (trained.vocab, trained.end_of_document) == (270, 0)
    trained.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    text = f"the cat {END_OF_DOCUMENT}"
    np.testing.assert_array_equal(loaded.encode(text), trained.encode(text))
    assert loaded.decode(loaded.encode(text)) == text
    compact = json.dumps(json.loads((tmp_path / "t.json").read_text()))
    (tmp_path / "c.json").write_text(compact)
    assert Tokenizer.load(tmp_path / "c.json").sha256 == loaded.sha256 == trained.sha256
    assert trained.sha256 != SHIPPED.sha256


def test_too_little_text_for_the_vocabulary_is_refused():
    """Catches a tokenizer that is smaller than the model's embedding says."""
    with pytest.raises(DataError, match="vocab = 4000"):
        train_tokenizer(["a few words"], vocab=4000)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    """Catches the library's bare Exception, and a tokenizer that cannot end a document."""
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="is no tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    SHIPPED.save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text().replace(END_OF_DOCUMENT, "<|other|>")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="has no token"):
        Tokenizer.load(tmp_path / "a.json")


def test_balanced_texts_take_equal_parts(texts_corpus):
    """Catches a vocabulary learnt on the largest group."""
    corpus = texts_corpus({"large": ["x" * 10] * 100, "small": ["y" * 10] * 30})
    texts = list(balanced_texts(corpus, 200))
    assert sum("x" in t for t in texts) == sum("y" in t for t in texts) == 20


SHIPPED_SHA256 = "6111fad4959a41bdfe7386aa15d224021fb542b6733629a17a9569901ed35fc6"
