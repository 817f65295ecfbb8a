"""Small tokenizers of the library, and what a GGUF file says of them."""

import json

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers, trainers

from moejax.data import END_OF_DOCUMENT
from tests.files import gguf_writer as w

TEXTS = ["the cat sat on the mat in 1984, the cat's hat", "größer als 12345 – 日本"] * 5
SPECIAL = [END_OF_DOCUMENT, "<|im_start|>"]


def _trained(digits: bool) -> LibraryTokenizer:
    """A BPE of the library, digits one by one where asked."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    bpe = LibraryTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cut, level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return bpe


REFERENCE = {"gpt-2": _trained(digits=False), "smollm": _trained(digits=True)}
SIZE = REFERENCE["smollm"].get_vocab_size()


def metadata(cut: str, **changes) -> dict:
    """Fields of a tokenizer; `changes` by the last part of their name."""
    model = json.loads(REFERENCE[cut].to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    fields = {
        "model": (w.STRING, "gpt2"),
        "pre": (w.STRING, cut),
        "tokens": (w.ARRAY, (w.STRING, tokens)),
        "token_type": (w.ARRAY, (w.I32, kinds)),
        "merges": (w.ARRAY, (w.STRING, merges)),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}
