"""A researcher's own text: a folder of .txt, .jsonl and .parquet files."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.core.errors import DataError
from moejax.data.corpus import Split, check_group, split_of
from moejax.files import content_hash, sha256_of_file

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PASSAGE = 8192


class FolderCorpus:
    """The text files below a folder; its subfolders are the groups, or it is one group itself.

    A .jsonl line and a .parquet row are a document, their text under `field`; a .txt file is cut at
    blank lines into documents of at least 8192 characters. A hash of a document's text decides its
    split, so that exact copies, in whatever file or group, are on one side.
    Raises DataError if there is no such folder or no text file in it.
    """

    def __init__(self, path: Path | str, *, field: str = "text", heldout_share: float = 0.02):
        """heldout_share: share of documents each for held-out and validation."""
        if not 0 < heldout_share < 0.5:
            raise DataError(
                f"FolderCorpus.heldout_share = {heldout_share} leaves no training text.",
                "Give a share above 0 and below 0.5.",
            )
        self._root, self._field, self._share = Path(path), field, heldout_share
        self._files = _files_by_group(self._root)
        self.groups: tuple[str, ...] = tuple(self._files)

    @property
    def fingerprint(self) -> str:
        """A hash of names and contents of all files and of how they are read."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        files = [
            (group, path.relative_to(self._root).as_posix(), sha256_of_file(path))
            for group, paths in self._files.items()
            for path in paths
        ]
        return content_hash("FolderCorpus", self._field, self._share, files)

    def documents(self, group: str, split: Split) -> Iterator[str]:
        """The documents of a group's split, by file name and place in the file."""
        check_group(self, group)
        for path in self._files[group]:
            for text in self._texts(path):
                if text.strip() and split_of(text, self._share) == split:
                    yield text

    def _texts(self, path: Path) -> Iterator[str]:
        match path.suffix:
            case ".txt":
                return _passages(_utf8(path))
            case ".jsonl":
                return self._json_texts(path)
            case _:
                return self._parquet_texts(path)

    def _json_texts(self, path: Path) -> Iterator[str]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield self._text_of(line, f"{path}, line {number}")

    def _text_of(self, line: bytes, where: str) -> str:
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON: {error}.", "Mend or delete the line.") from error
        text = record.get(self._field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(
                f"{where} has no text under {self._field!r}.",
                'Each line is an object like {"text": "..."}; `field` names another key.',
            )
        return text

    def _parquet_texts(self, path: Path) -> Iterator[str]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise DataError(
                f"{path} needs pyarrow, which is not installed.", "pip install 'moejax[data]'."
            ) from error
        try:
            with parquet.ParquetFile(path) as file:
                if self._field not in file.schema_arrow.names:
                    raise DataError(
                        f"{path} has no column {self._field!r}.",
                        f"Its columns are {', '.join(file.schema_arrow.names)}; set `field`.",
                    )
                for rows in file.iter_batches(columns=[self._field]):
                    yield from (t for t in rows.column(0).to_pylist() if isinstance(t, str))
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}.", "Write the file again.") from error


def _files_by_group(root: Path) -> dict[str, list[Path]]:
    if not root.is_dir():
        raise DataError(f"the corpus folder {root} does not exist.", "Check the path.")
    found = sorted(p for p in root.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
    groups: dict[str, list[Path]] = {}
    for path in found:
        parts = path.relative_to(root).parts
        groups.setdefault(parts[0] if len(parts) > 1 else root.resolve().name, []).append(path)
    if not groups:
        raise DataError(
            f"{root} holds no text.", f"Put files ending in {', '.join(_SUFFIXES)} into it."
        )
    return dict(sorted(groups.items()))


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Save it as UTF-8.") from error


def _passages(text: str) -> Iterator[str]:
    """Paragraphs joined until a passage is long enough to be a document."""
    passage: list[str] = []
    size = 0
    for blank, lines in itertools.groupby(text.split("\n"), key=lambda line: not line.strip()):
        if blank:
            continue
        passage.append("\n".join(lines))
        size += len(passage[-1])
        if size >= _PASSAGE:
            yield "\n\n".join(passage)
            passage, size = [], 0
    if passage:
        yield "\n\n".join(passage)
