"""Errors of configs: the file and line first, then what is wrong, then one line of mend."""

from __future__ import annotations

import difflib
import re
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from moejax.config.values import Location, Origin
from moejax.core.errors import ConfigError, MoejaxError, SpecError


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """Up to `n` of `names` that look like `name`, as text; empty when none does."""
    by_folded = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_folded, n=n, cutoff=0.6)
    return ", ".join(by_folded[folded] for folded in close)


def located(error: MoejaxError, where: Location) -> ConfigError:
    """The error as a ConfigError that begins with its file and line."""
    return ConfigError(f"{where}: {error.problem}", error.fix)


def owner_of(error: SpecError) -> str:
    """The class whose field a SpecError names: its text begins with Owner.field."""
    return error.problem.partition(".")[0]


@contextmanager
def locating(where: Location) -> Iterator[None]:
    """Names `where` in front of every MoejaxError that the block raises."""
    try:
        yield
    except MoejaxError as error:
        raise located(error, where) from error


def unreadable(error: Exception, where: Location) -> ConfigError:
    """A syntax error of gin or of Python's tokenizer, as a ConfigError with its line."""
    if isinstance(error, tokenize.TokenError):
        message, (line, _) = error.args
        return ConfigError(
            f"{where.at(line)}: {message}.", "Close the bracket or quote that was opened before."
        )
    if not isinstance(error, SyntaxError):  # the parser ran past the end of its text
        return ConfigError(f"{where}: it ends in the middle of a statement.", _STATEMENT)
    here = where.at(error.lineno or where.line)
    if where.origin is Origin.SET and "token" not in error.msg:
        return ConfigError(f"{where} is no binding.", "Write --set Name.parameter=value.")
    message = error.msg.splitlines()[0].rstrip(".")
    token = re.search(r"Failed to parse token '(.*)'", error.msg)
    if token is None:
        content = (error.text or "").strip()
        return ConfigError(f"{here}: {content!r} cannot be read: {message}.", _STATEMENT)
    word = token[1]
    if word.lower() in ("true", "false", "none"):
        return ConfigError(f"{here}: {word} is no value.", f"Write {word.capitalize()}.")
    return ConfigError(
        f"{here}: {word} is no value.",
        f"Text needs quotes ('{word}'), an object @ and brackets (@{word}()), a macro % (%{word}).",
    )


_STATEMENT = "Write Name.parameter = value, name = value for a macro, or include 'file.gin'."
