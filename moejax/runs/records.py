"""Frozen dataclasses as JSON records: an exact round trip, with nan and inf kept as strings.

JSON has no word for nan and infinity, and a model that was compressed to death has both. They are
written as "nan", "inf" and "-inf" everywhere in a run folder, and read back as floats.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar

from moejax.core.errors import RunError

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
R = TypeVar("R")


def to_record(value: Any) -> Any:
    """`value` as plain JSON data: dataclasses become dicts, tuples and arrays become lists."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_record(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_record(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_record(item) for item in value]
    tolist = getattr(value, "tolist", None)  # arrays and array scalars, of NumPy or of JAX
    return str(value) if tolist is None else to_record(tolist())


def plain_floats(data: Any) -> Any:
    """JSON data with "nan", "inf" and "-inf" turned back into floats."""
    if isinstance(data, str):
        return NON_FINITE.get(data, data)
    if isinstance(data, list):
        return [plain_floats(item) for item in data]
    if isinstance(data, dict):
        return {key: plain_floats(item) for key, item in data.items()}
    return data


def from_record(cls: type[R], data: Any, where: str = "record") -> R:
    """The instance of dataclass `cls` that `to_record` made `data` from.

    where: what is being read, for the message.
    Raises RunError for a missing or unknown field or a value of another type.
    """
    if not isinstance(data, dict):
        raise _misfit(where, data, cls)
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise RunError(
                f"{where}: {cls.__name__} has no field {name!r}.",
                "The file was written by another version of moejax.",
            )
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _read(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RunError(
                f"{where}: {cls.__name__} lacks its field {name!r}.",
                "The file was written by another version of moejax.",
            )
    return cls(**values)


_hints = functools.cache(typing.get_type_hints)


def _read(hint: Any, data: Any, where: str) -> Any:
    if hint is Any:
        return plain_floats(data)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _read_union(inner, data, where)
    if dataclasses.is_dataclass(hint):
        return from_record(typing.cast(type, hint), data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_read(inner[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _read(inner[1], item, f"{where}.{key}") for key, item in data.items()}
    if hint is dict and isinstance(data, dict):
        return plain_floats(data)
    if hint is float and isinstance(data, str) and data in NON_FINITE:
        return NON_FINITE[data]
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if hint is int and isinstance(data, int) and not isinstance(data, bool):
        return data
    if (hint is str or hint is bool) and isinstance(data, hint):
        return data
    raise _misfit(where, data, hint)


def _read_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    choices = [option for option in options if option is not type(None)]
    for option in choices[:-1]:
        try:
            return _read(option, data, where)
        except RunError:
            continue
    return _read(choices[-1], data, where)


def _misfit(where: str, data: Any, expected: Any) -> RunError:
    name = getattr(expected, "__name__", str(expected))
    return RunError(
        f"{where} = {data!r:.80} is no {name}.",
        "The file is damaged or of another version of moejax.",
    )
