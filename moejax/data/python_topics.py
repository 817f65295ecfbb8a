"""A text on which a published GGUF model's perplexity is known, so that a loader can be checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from moejax.core.errors import DataError
from moejax.data.corpus import Split, check_group
from moejax.files import find_resource

SHA256 = "1231b21210c892d7214bb501085cf23dd5af9cd7e22bd481f1c1b5612f187eed"
_PLACE = "heldout/python_topics.jsonl"


class PythonTopics:
    """The beginning of the topic "specialnames" of CPython 3.11.7's language reference.

    One document of 17,796 bytes, 4096 tokens of SmolLM2. The text ships with moejax, because other
    releases of Python have another, and is checked by its sha256.
    """

    groups: tuple[str, ...] = ("python_topics",)

    @property
    def fingerprint(self) -> str:
        """The text's sha256."""
        return SHA256

    def documents(self, group: str, split: Split = "heldout") -> Iterator[str]:
        """The text; DataError for any split but "heldout", or if the file was changed."""
        check_group(self, group)
        if split != "heldout":
            raise DataError(
                f"PythonTopics has no split {split!r}.", "It is held-out text and nothing else."
            )
        line = find_resource("assets", _PLACE).read_text(encoding="utf-8")
        text = json.loads(line)["text"]
        if (found := hashlib.sha256(text.encode()).hexdigest()) != SHA256:
            raise DataError(
                f"the text of assets/{_PLACE} has sha256 {found}, expected {SHA256}.",
                "Install moejax again.",
            )
        yield text
