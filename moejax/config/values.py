"""What stands on the right of a binding, and where it was written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.config.registry import Configurable

MACRO = "gin.macro"  # a macro `m = 3` is the binding of `value` in scope m, as in gin
REQUIRED = object()  # %gin.REQUIRED: whoever includes this must bind it


class Origin(Enum):
    """Who wrote a binding: what the user typed and never took effect is an error."""

    FILE = auto()
    INCLUDE = auto()
    SET = auto()


@dataclass(frozen=True)
class Location:
    """Where a binding was written. line: from 1; 0 for one on the command line."""

    file: str
    line: int = 0
    origin: Origin = Origin.FILE

    def at(self, line: int) -> Location:
        """Another line of the same file."""
        return self if self.origin is Origin.SET else dataclasses.replace(self, line=line)

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}" if self.line else self.file


@dataclass(frozen=True)
class Reference:
    """`@scope/Name()`: an object to build, in `scopes`, or in the scope of its user when empty."""

    target: Configurable
    scopes: tuple[str, ...]


@dataclass(frozen=True)
class Macro:
    """`%name`."""

    scopes: tuple[str, ...]


@dataclass(frozen=True)
class Bound:
    """A value as written: literals, tuples and dicts of them, references and macros."""

    value: Any
    where: Location


def names_objects(value: Any) -> bool:
    """Whether the value holds a reference or a macro."""
    if isinstance(value, tuple | dict):
        return any(map(names_objects, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Reference | Macro)


def written(value: Any) -> str:
    """The value as gin text; ValueError when gin cannot write it."""
    if isinstance(value, Reference):
        return f"@{'/'.join((*value.scopes, value.target.name))}()"
    if isinstance(value, Macro):
        return "%" + "/".join(value.scopes)
    if value is REQUIRED:
        return "%gin.REQUIRED"
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(k)}: {written(v)}' for k, v in value.items())}}}"
    if type(value) is float and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # the literal that Python reads as infinity
    if type(value) in (bool, int, str, type(None)) or (type(value) is float and value == value):
        return repr(value)
    raise ValueError(f"gin cannot write {value!r}")
