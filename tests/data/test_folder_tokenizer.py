"""Tokenizers of model folders: which token ends a document, and what is missing."""

import json

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from moejax.core.errors import DataError
from moejax.data import Tokenizer, folder_tokenizer, shipped_tokenizer, train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog"] * 3


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(TEXTS, 260).save(tmp_path / "tokenizer.json")
    return tmp_path


def test_without_a_word_documents_end_as_moejax_ends_them(folder):
    """Catches a folder of a moejax run whose tokenizer cannot be read back."""
    assert folder_tokenizer(folder).sha256 == Tokenizer.load(folder / "tokenizer.json").sha256


@pytest.mark.parametrize(
    ("file", "fields", "end"),
    [
        ("tokenizer_config.json", {"eos_token": "a"}, "a"),
        ("tokenizer_config.json", {"eos_token": {"content": "b"}}, "b"),
        ("config.json", {"eos_token_id": 0}, "<|endoftext|>"),
        ("config.json", {"eos_token_id": [0, 5]}, "<|endoftext|>"),
        ("config.json", {"eos_token_id": 99_999}, "<|endoftext|>"),
    ],
)
def test_the_folder_says_what_ends_a_document(folder, file, fields, end):
    """Catches an eos that is an object or a list, and an id beyond the vocabulary."""
    (folder / file).write_text(json.dumps(fields))
    found = folder_tokenizer(folder)
    assert found.decode([found.end_of_document]) == end


@pytest.mark.parametrize("bad", ["{", "", "[" * 20_000])
def test_damage_and_absence_are_named(folder, bad):
    """Catches a raw error of the tokenizers library, or a default for what is damaged."""
    (folder / "tokenizer_config.json").write_text('{"eos_token": "nowhere"}')
    with pytest.raises(DataError, match="no token 'nowhere'"):
        folder_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(bad)
    with pytest.raises(DataError, match="tokenizer_config"):
        folder_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text(bad)
    with pytest.raises(DataError, match="no tokenizer"):
        folder_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").touch()
    with pytest.raises(DataError, match=r"only tokenizer\.model"):
        folder_tokenizer(folder)


def test_a_tokenizer_without_merges_has_a_hash(tmp_path):
    """Catches a hash that only byte-pair encodings have."""
    words = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    other = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "b": 1}, unk_token="</s>"))
    first, second = (Tokenizer(bpe, "</s>").sha256 for bpe in (words, other))
    assert first != second


def test_a_hash_tells_tokenizers_that_cut_a_text_differently():
    """Catches a hash of vocabulary and merges alone, under which the tokens of one are the cached
    tokens of the other."""

    def made(*cuts, normalizer=None):
        bpe = tokenizers.Tokenizer.from_str(shipped_tokenizer()._bpe.to_str())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.normalizer = normalizer
        return Tokenizer(bpe)

    kinds = [
        made(),
        made(pre_tokenizers.Digits(individual_digits=True)),
        made(normalizer=normalizers.Lowercase()),
    ]
    assert len({tuple(kind.encode("Year 2026")) for kind in kinds}) == 3
    assert len({kind.sha256 for kind in kinds}) == 3
