"""A spec written in one line, as on the command line: SymmetricGrid(bits=4, group=128)."""

from __future__ import annotations

import ast
from typing import Any

from moejax.config.registry import lookup
from moejax.core.errors import ConfigError


def spec_from(text: str) -> Any:
    """The object that `text` describes: a name that gin files may use, fields by keyword.

    Raises ConfigError for anything but literals and further such objects; nothing is evaluated.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _built(tree.body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{text!r} describes no object.", "Write it like SymmetricGrid(bits=4, group=128)."
        ) from error
    except TypeError as error:
        raise ConfigError(f"{text!r}: {error}.", "Give each field by its name.") from error


def _built(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        fields = {word.arg: _built(word.value) for word in node.keywords if word.arg}
        if len(fields) == len(node.keywords):
            return lookup(node.func.id).target(**fields)
    if isinstance(node, ast.Tuple):
        return tuple(map(_built, node.elts))
    return ast.literal_eval(node)
