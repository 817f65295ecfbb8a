"""The tokenizer that a GGUF file carries: byte-level BPE with its merges and special tokens."""

from __future__ import annotations

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from moejax.core.errors import DataError
from moejax.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from moejax.files import GGUF

_AGAIN = "Fetch or write the file again."
_NORMAL, _CONTROL = 1, 3  # llama.cpp's llama_token_type

# tokenizer.ggml.pre -> how a text is cut before merges. ByteLevel brings GPT-2's pattern; where
# digits are cut one by one first, llama.cpp (llama-vocab.cpp) and the Hugging Face file agree.
_CUTS = {
    "gpt-2": (),
    "smollm": (pre_tokenizers.Digits(individual_digits=True),),
}


def gguf_tokenizer(file: GGUF) -> Tokenizer:
    """The tokenizer in a GGUF file; its control tokens are ids that no text encodes to.

    Raises DataError for another kind than byte-level BPE, another pre-tokenizer than those moejax
    knows, tokens of a kind it does not, or merges that do not fit the tokens.
    """
    model, cut = (file.field(f"tokenizer.ggml.{key}", str) for key in ("model", "pre"))
    if model != "gpt2" or cut not in _CUTS:
        raise DataError(
            f"{file.path}: the tokenizer is {model!r} with pre-tokenizer {cut!r}; moejax reads "
            f"'gpt2' with {' or '.join(map(repr, _CUTS))}.",
            "Use the tokenizer.json of the model's Hugging Face folder.",
        )
    tokens = file.field("tokenizer.ggml.tokens", list)
    if not all(isinstance(token, str) for token in tokens):
        raise DataError(f"{file.path}: tokenizer.ggml.tokens holds other things than text.", _AGAIN)
    special = _special(file, tokens)
    bpe = tokenizers.Tokenizer(_bpe(file, tokens))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*_CUTS[cut], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return Tokenizer(bpe)


def _bpe(file: GGUF, tokens: list[str]) -> models.BPE:
    """The merges; a byte without a token, which the library would drop, becomes the end token.

    SmolLM2 lacks six control characters and the first bytes of rare planes; Tokenizer.encode
    raises where the end token shows up in a text.
    """
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise DataError(f"{file.path}: tokenizer.ggml.tokens holds a token twice.", _AGAIN)
    pairs = []
    for number, merge in enumerate(file.field("tokenizer.ggml.merges", list)):
        left, gap, right = str(merge).partition(" ")
        if not (gap and left in vocab and right in vocab and left + right in vocab):
            raise DataError(
                f"{file.path}: tokenizer.ggml.merges[{number}] = {merge!r} fits no tokens.", _AGAIN
            )
        pairs.append((left, right))
    return models.BPE(vocab, pairs, unk_token=END_OF_DOCUMENT)


def _special(file: GGUF, tokens: list[str]) -> list[str]:
    kinds = file.field("tokenizer.ggml.token_type", np.ndarray)
    if len(kinds) != len(tokens):
        raise DataError(
            f"{file.path}: {len(tokens)} tokens, but tokenizer.ggml.token_type has {len(kinds)}.",
            _AGAIN,
        )
    if kinds.dtype.kind not in "iu":
        raise DataError(f"{file.path}: tokenizer.ggml.token_type holds {kinds.dtype}.", _AGAIN)
    if other := sorted({int(kind) for kind in kinds} - {_NORMAL, _CONTROL}):
        raise DataError(
            f"{file.path}: tokenizer.ggml.token_type holds {other[0]}; moejax reads 1 (normal) "
            "and 3 (control).",
            "Use the tokenizer.json of the model's Hugging Face folder.",
        )
    return [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
