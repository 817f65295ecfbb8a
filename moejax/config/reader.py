"""gin's grammar, read into bindings that remember their file and line."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gin import config_parser

from moejax.config.errors import locating, nearest, owner_of, unreadable
from moejax.config.registry import Configurable, lookup, register
from moejax.config.search import find_include, shown
from moejax.config.values import (
    MACRO,
    REQUIRED,
    Bound,
    Location,
    Macro,
    Origin,
    Reference,
    names_objects,
)
from moejax.core.errors import ConfigError, SpecError

Key = tuple[str, str]  # scope ("" or "a/b"), complete selector


class Bindings:
    """All bindings of one config, as gin keeps them: a later one replaces an earlier one.

    by_key: (scope, selector) -> parameter -> Bound. modules: what `import` statements named.
    restructured: whether the command line changed which objects are built, not only their numbers.
    """

    def __init__(self) -> None:
        self.by_key: dict[Key, dict[str, Bound]] = {}
        self.modules: list[str] = []
        self.restructured = False
        self._open: list[Path] = []

    def visible(self, scopes: tuple[str, ...], selector: str) -> dict[str, tuple[Key, Bound]]:
        """What a call of `selector` in `scopes` is given: inner scopes win over outer ones."""
        found: dict[str, tuple[Key, Bound]] = {}
        for depth in range(len(scopes) + 1):
            key = ("/".join(scopes[:depth]), selector)
            found.update({name: (key, bound) for name, bound in self.by_key.get(key, {}).items()})
        return found

    def line_of(self, error: SpecError) -> Location | None:
        """Where the field that `error` names was bound, if its value or its name tells."""
        owner = owner_of(error)
        field = error.field.partition("[")[0]
        found = [
            arguments[field]
            for (_, selector), arguments in self.by_key.items()
            if field in arguments and selector.rpartition(".")[2] == owner
        ]
        words = f"{owner}.{field} = "
        same = [b for b in found if error.problem.startswith(f"{words}{b.value!r} ")]
        if same:
            return same[-1].where
        return found[0].where if len(found) == 1 else None

    def read_file(self, path: Path, origin: Origin) -> None:
        """Reads a file and what it includes. ConfigError for anything gin or moejax rejects."""
        where = Location(shown(path), origin=origin)
        if path.resolve() in self._open:
            raise ConfigError(f"{where} includes itself.", "Remove one of the includes.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read: {error}.", "Name a text file.") from error
        self._open.append(path.resolve())
        self._read(text, where, path)
        self._open.pop()

    def read_binding(self, text: str) -> None:
        """Reads one binding of the command line, such as "GPTQ.bits=3"."""
        where = Location(f"--set {text}", origin=Origin.SET)
        statements = _statements(text, where)
        if len(statements) != 1 or not isinstance(statements[0], config_parser.BindingStatement):
            raise ConfigError(f"{where} is no binding.", "Write --set Name.parameter=value.")
        self._read(text, where, None)

    def _read(self, text: str, where: Location, path: Path | None) -> None:
        for statement in _statements(text, where):
            here = where.at(statement.location.line_num)
            if isinstance(statement, config_parser.IncludeStatement) and path is not None:
                with locating(here):
                    included = find_include(statement.filename, path)
                self.read_file(included, Origin.INCLUDE)
            else:
                with locating(here):
                    self._take(statement, here)

    def _take(self, statement: Any, here: Location) -> None:
        if isinstance(statement, config_parser.BindingStatement):
            self._bind(statement, here)
        elif isinstance(statement, config_parser.BlockDeclaration):
            lookup(statement.selector)
        elif isinstance(statement, config_parser.ImportStatement):
            if statement.is_from or statement.alias:
                raise ConfigError(
                    f"{statement.format()!r} is not understood.", "Write import my_lab.passes."
                )
            register([statement.module])
            self.modules.append(statement.module)

    def _bind(self, statement: config_parser.BindingStatement, here: Location) -> None:
        value = _resolved(statement.value)
        if not statement.arg_name:  # a macro
            scope = f"{statement.scope}/{statement.selector}".removeprefix("/")
            self._put((scope, MACRO), "value", Bound(value, here))
            return
        target = lookup(statement.selector)
        name = statement.arg_name
        if name not in target.parameters:
            near = nearest(name, target.parameters)
            takes = f"{target.name} takes {', '.join(target.parameters) or 'no parameters'}."
            raise ConfigError(
                f"{target.name} has no parameter {name!r}.",
                f"Did you mean {near}? {takes}" if near else takes,
            )
        self._put((statement.scope, target.selector), name, Bound(value, here))

    def _put(self, key: Key, name: str, bound: Bound) -> None:
        arguments = self.by_key.setdefault(key, {})
        values = [bound.value, arguments[name].value if name in arguments else None]
        if bound.where.origin is Origin.SET and any(map(names_objects, values)):
            self.restructured = True
        arguments[name] = bound


@dataclass(frozen=True)
class _Unresolved:
    """A name after @, before it is looked up: gin's parser would blur the error's place."""

    scoped: str
    evaluate: bool


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        return _Unresolved(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Any:
        return REQUIRED if macro_name == "gin.REQUIRED" else Macro(tuple(macro_name.split("/")))


def _statements(text: str, where: Location) -> list[Any]:
    try:
        parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
        return list(iter(parser.parse_statement, None))
    except (SyntaxError, tokenize.TokenError, StopIteration) as error:
        raise unreadable(error, where) from error


def _resolved(value: Any) -> Any:
    """The value with its names looked up; lists become tuples, because specs are hashable."""
    if isinstance(value, list | tuple):
        return tuple(map(_resolved, value))
    if isinstance(value, Mapping):
        return {_resolved(name): _resolved(item) for name, item in value.items()}
    if not isinstance(value, _Unresolved):
        return value
    *scopes, selector = value.scoped.split("/")
    target: Configurable = lookup(selector)
    if not value.evaluate:
        raise ConfigError(
            f"@{value.scoped} is the name of {target.name}, not an object.",
            f"Write @{value.scoped}().",
        )
    return Reference(target, tuple(scopes))
