"""Validation text: whole documents, exact bytes."""

import pytest

from moejax.core import DataError
from moejax.data import tokenize_corpus, train_tokenizer
from moejax.train.validation import validation_text

LONG = "long words " * 30


class Notes:
    """Three documents per group; the second is longer than the limit of the test."""

    groups = ("a", "b")
    fingerprint = "notes"

    def documents(self, group, split):
        return iter([f"{group} first é", LONG, f"{group} third"])


@pytest.fixture
def tokenizer():
    return train_tokenizer([LONG, "a first é", "b third"], 260)


def test_takes_whole_documents_and_counts_their_bytes(tmp_path, tokenizer):
    """Catches characters counted for bytes, an end not counted, a document cut in two."""
    store = tokenize_corpus(Notes(), tokenizer, "valid", tmp_path)
    text = validation_text(store, tokenizer, 100, length=4, batch=3)
    expected = "a first é\na third\n"
    assert text.group_bytes == {"a": len(expected.encode()), "b": len(expected.encode())}
    targets = [b.targets_BxS[b.mask_BxS] for b in text.batches if b.group == "a"]
    ids = [int(i) for part in targets for i in part]
    assert tokenizer.decode(ids).replace("<|endoftext|>", "\n") == expected


def test_a_group_without_a_document_that_fits_is_named(tmp_path, tokenizer):
    """Catches a group that is scored on nothing."""
    store = tokenize_corpus(Notes(), tokenizer, "valid", tmp_path)
    with pytest.raises(DataError, match="group 'a' has no valid document"):
        validation_text(store, tokenizer, 5, length=4, batch=3)
