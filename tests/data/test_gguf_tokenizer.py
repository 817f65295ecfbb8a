"""The tokenizer of a GGUF file gives the ids of the one it was written from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import DataError
from moejax.data import folder_tokenizer, gguf_tokenizer, write_folder_tokenizer
from moejax.files import GGUF
from tests.data.gguf_bpe import REFERENCE, SIZE, TEXTS, metadata
from tests.files import gguf_writer as w


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Pre-tokenizer kind -> the tokenizer read back from a file."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for cut in REFERENCE:
        w.write_gguf(folder / f"{cut}.gguf", metadata(cut), {})
    return {cut: gguf_tokenizer(GGUF(folder / f"{cut}.gguf")) for cut in REFERENCE}


@pytest.mark.parametrize("cut", list(REFERENCE))
@given(text=st.text(max_size=40) | st.sampled_from([*TEXTS, "a1984b", "<|im_start|>"]))
@settings(max_examples=80, deadline=None)
def test_ids_are_those_of_the_original(read, cut, text):
    """Catches merges in another order, digits kept together, and special tokens read in a text."""
    REFERENCE[cut].encode_special_tokens = True
    assert read[cut].encode(text).tolist() == REFERENCE[cut].encode(text).ids
    assert read[cut].decode(read[cut].encode(text)) == text


def test_digits_are_cut_one_by_one_for_smollm_alone(read):
    """Catches one pre-tokenizer taken for all."""
    assert len(read["smollm"].encode("12345")) == 5
    assert read["smollm"].end_of_document == read["gpt-2"].end_of_document == 0


def test_it_lies_beside_a_saved_model(read, tmp_path):
    """Catches a saved model that comes back with the tokenizer that ships."""
    write_folder_tokenizer(tmp_path, read["smollm"])
    back = folder_tokenizer(tmp_path)
    assert back.sha256 == read["smollm"].sha256
    text = "in 1984 <|im_start|>"
    np.testing.assert_array_equal(back.encode(text), read["smollm"].encode(text))


def test_a_byte_without_a_token_is_an_error(tmp_path):
    """Catches bytes that the library drops without a word."""
    fields = metadata("smollm")
    _, (kind, tokens) = fields["tokenizer.ggml.tokens"]
    tokens = ["<lost>" if token == "Q" else token for token in tokens]
    changed = metadata("smollm", tokens=(w.ARRAY, (kind, tokens)))
    w.write_gguf(tmp_path / "a.gguf", changed, {})
    tokenizer = gguf_tokenizer(GGUF(tmp_path / "a.gguf"))
    with pytest.raises(DataError, match="the text holds 'Q'"):
        tokenizer.encode("SQL")
    with pytest.raises(DataError, match="the text holds 'Q'"):
        tokenizer.encode_documents(["fine", "SQL"])


DAMAGED = {
    "pre-tokenizer 'tekken'": {"pre": (w.STRING, "tekken")},
    "the tokenizer is 'llama'": {"model": (w.STRING, "llama")},
    "holds a token twice": {"tokens": (w.ARRAY, (w.STRING, ["a"] * SIZE))},
    "fits no tokens": {"merges": (w.ARRAY, (w.STRING, ["nowhere tobefound"]))},
    "token_type has 1": {"token_type": (w.ARRAY, (w.I32, [1]))},
    "token_type holds float32": {"token_type": (w.ARRAY, (w.F32, [float("nan")] * SIZE))},
    "other things than text": {"tokens": (w.ARRAY, (w.ARRAY, [(w.U8, [1])] * SIZE))},
    "token_type holds 6": {"token_type": (w.ARRAY, (w.I32, [6] * SIZE))},
    "no token '<|endoftext|>'": {
        "tokens": (w.ARRAY, (w.STRING, [f"t{i}" for i in range(SIZE)])),
        "merges": (w.ARRAY, (w.STRING, [])),
    },
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_what_cannot_be_read_is_named(tmp_path, problem):
    """Catches a tokenizer of another kind that gives ids all the same."""
    w.write_gguf(tmp_path / "a.gguf", metadata("smollm", **DAMAGED[problem]), {})
    with pytest.raises(DataError, match=problem.replace("|", r"\|")):
        gguf_tokenizer(GGUF(tmp_path / "a.gguf"))
