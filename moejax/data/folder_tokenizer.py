"""The tokenizer of a model folder: tokenizer.json, and which of its tokens ends a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from moejax.core.atomic import read_json, write_json
from moejax.core.errors import DataError, RunError
from moejax.data.tokenizer import END_OF_DOCUMENT, Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"


def folder_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer in a folder of moejax or of Hugging Face.

    A document ends with the eos_token of tokenizer_config.json or the eos_token_id of config.json,
    in a folder that moejax trained with <|endoftext|>.
    Raises DataError if the folder has no tokenizer.json, or a damaged one.
    """
    folder = Path(folder)
    path = folder / TOKENIZER
    if not path.is_file():
        other = next(iter(sorted(folder.glob("tokenizer.model"))), None)
        raise DataError(
            f"{folder} has no {TOKENIZER}" + (f", only {other.name}." if other else "."),
            "Save it with transformers' AutoTokenizer, use_fast=True, into the same folder.",
        )
    return Tokenizer.load(path, _end_of_document(folder, path))


def write_folder_tokenizer(folder: Path | str, tokenizer: Tokenizer) -> None:
    """Puts a tokenizer where `folder_tokenizer` finds it, its end-of-document token with it."""
    tokenizer.save(Path(folder) / TOKENIZER)
    write_json(Path(folder) / CONFIG, {"eos_token": tokenizer.end_token})


def _end_of_document(folder: Path, path: Path) -> str:
    named: Any = _fields(folder / CONFIG).get("eos_token")
    if isinstance(named, dict):
        named = named.get("content")
    if isinstance(named, str):
        return named
    number = _fields(folder / "config.json").get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if isinstance(number, int):
        try:
            token = tokenizers.Tokenizer.from_file(str(path)).id_to_token(number)
        except (
            Exception
        ):  # the library raises bare Exception; Tokenizer.load will say what is wrong
            token = None
        if token is not None:
            return token
    return END_OF_DOCUMENT


def _fields(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path) if path.is_file() else {}
    except RunError as error:
        raise DataError(error.problem, "Fetch the folder again.") from error
    return found if isinstance(found, dict) else {}
