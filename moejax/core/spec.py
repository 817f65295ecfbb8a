"""Specs: frozen, hashable, type-checked descriptions that travel as JSON.

`@spec` makes a class a frozen keyword dataclass whose fields are checked against their annotations
when it is built, and registers it by name, so that `from_json` rebuilds exactly the classes that
were registered and runs nothing else.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any, TypeVar, dataclass_transform

from moejax.core.errors import CheckpointError, SpecError

_SPECS: dict[str, type] = {}
C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: C) -> C:
    """Class decorator: a frozen, keyword-only dataclass, checked by type and by its own `check()`.

    A field annotated `float` accepts an int and stores a float; a list given for a tuple is an
    error, because a spec must be hashable. Raises SpecError when an instance is built.
    """
    check = cls.__dict__.get("check")

    def __post_init__(self: Any) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = _checked(
                type(self).__name__, field.name, getattr(self, field.name), hints[field.name]
            )
            object.__setattr__(self, field.name, value)
        if check is not None:
            check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    built = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    known = _SPECS.setdefault(cls.__name__, built)
    if known is not built and known.__module__ != built.__module__:
        raise TypeError(
            f"two specs are named {cls.__name__}: {known.__module__} and {built.__module__}"
        )
    _SPECS[cls.__name__] = built
    return built  # type: ignore[return-value]


def check_that(condition: bool, owner: object, field: str, fix: str) -> None:
    """Raises SpecError naming `owner.field` and its value unless `condition` holds."""
    if not condition:
        value = getattr(owner, field)
        raise SpecError(
            f"{type(owner).__name__}.{field} = {value!r} is impossible.", fix, field=field
        )


def to_json(value: Any) -> Any:
    """A spec, or a tuple, dict or plain value of specs, as JSON data with a `type` per spec."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if _SPECS.get(name) is not type(value):
            raise TypeError(f"{name} is not a registered spec")
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": name, **fields}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} cannot be part of a spec")


def from_json(data: Any) -> Any:
    """The inverse of `to_json`: only registered spec classes are built, lists become tuples.

    Raises CheckpointError for an unknown type or field, SpecError for an impossible value.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    if "type" not in data:
        return {key: from_json(item) for key, item in data.items()}
    cls = _SPECS.get(data["type"]) if isinstance(data["type"], str) else None
    if cls is None:
        raise CheckpointError(
            f"unknown spec type {data['type']!r}.",
            f"Known types: {', '.join(sorted(_SPECS))}; a newer moejax may have written this file.",
        )
    fields = {key: from_json(item) for key, item in data.items() if key != "type"}
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise CheckpointError(
            f"{cls.__name__} has no field {sorted(unknown)[0]!r}.",
            "The file was written by another version of moejax.",
        )
    try:
        return cls(**fields)
    except TypeError as error:
        problem = f"{cls.__name__} cannot be built: {error}."
        raise CheckpointError(problem, "The file is damaged.") from error


def known_specs() -> dict[str, type]:
    """Every registered spec class by name, as far as its module has been imported."""
    return dict(_SPECS)


_CACHED_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _CACHED_HINTS:
        _CACHED_HINTS[cls] = typing.get_type_hints(cls)
    return _CACHED_HINTS[cls]


def _checked(owner: str, field: str, value: Any, hint: Any) -> Any:
    """The value, an int widened to float where a float is asked for; SpecError on a wrong type."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        inner = typing.get_args(hint)
        each = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(each) == len(value):
            pairs = enumerate(zip(value, each, strict=True))
            return tuple(_checked(owner, f"{field}[{i}]", v, h) for i, (v, h) in pairs)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _checked(owner, field, value, option)
            except SpecError:
                continue
    elif _matches(value, hint):
        return value
    raise SpecError(
        f"{owner}.{field} = {value!r} has type {type(value).__name__}, expected {_name(hint)}.",
        f"Give {owner}.{field} a value of type {_name(hint)}.",
        field=field,
    )


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        return False  # a fitting tuple was handled before
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is not None:
        return isinstance(value, origin)
    if getattr(hint, "_is_protocol", False):
        return not isinstance(value, type) and _answers(value, hint)
    return isinstance(value, hint) and not isinstance(value, type)


def _answers(value: Any, protocol: type) -> bool:
    """Whether a value has the members of a protocol, and can be called as the protocol is.

    Members are looked up without being evaluated: isinstance would compute every property.
    """
    for base in protocol.__mro__:
        if getattr(base, "_is_protocol", False) and base is not typing.Protocol:
            for name in {*vars(base), *getattr(base, "__annotations__", {})}:
                missing = inspect.getattr_static(value, name, None) is None
                if missing and (not name.startswith("_") or name == "__call__"):
                    return False
    call = vars(protocol).get("__call__")
    if call is None:
        return True
    arguments = [None] * (len(inspect.signature(call).parameters) - 1)
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError:
        return False
    return True


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is not None:
        return str(hint).replace("typing.", "").replace("moejax.", "")
    return getattr(hint, "__name__", str(hint))
