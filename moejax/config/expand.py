"""A config as one text: every value the job was built from, defaults included.

Parsed alone it builds the same job, whatever becomes of included files and of defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from moejax.config.inject import Call, Injection
from moejax.config.reader import Bindings, Key
from moejax.config.registry import configurable_of
from moejax.config.values import MACRO, Macro, Reference, written

WIDTH = 100
_OMIT = object()  # a default that gin has no words for


def expanded_text(injection: Injection, modules: Iterable[str]) -> str:
    """The config of the job that `injection` built; `modules` are imported first.

    Objects come in the order of their users, parameters in the order of the signature.
    """
    calls = _spelled_out(injection.calls)
    blocks = [[f"import {module}" for module in dict.fromkeys(modules)]]
    blocks.append([_line(name, value) for name, value in sorted(injection.macros.items())])
    for key in _from_root(calls, injection.macros):
        call = calls[key]
        name = "/".join((*call.scopes, call.target.name))
        blocks.append([_line(f"{name}.{arg}", value) for arg, value in call.arguments.items()])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def bindings_text(bindings: Bindings) -> str:
    """What a file binds that runs nothing by itself and is there to be included."""
    lines = []
    for (scope, selector), arguments in bindings.by_key.items():
        name = scope if selector == MACRO else f"{scope}/{selector.rpartition('.')[2]}".lstrip("/")
        for argument, bound in arguments.items():
            lines.append(_line(name if selector == MACRO else f"{name}.{argument}", bound.value))
    return "\n".join(sorted(lines)) + "\n"


def _spelled_out(calls: dict[Key, Call]) -> dict[Key, Call]:
    """The calls, with objects that stand as defaults turned into references and calls of theirs."""
    spelled: dict[Key, Call] = {}
    taken = {scope for scope, _ in calls}

    def value_of(value: Any, scopes: tuple[str, ...], name: str) -> Any:
        if isinstance(value, tuple):
            items = [value_of(item, scopes, f"{name}_{i}") for i, item in enumerate(value)]
            return _OMIT if _OMIT in items else tuple(items)
        if _writable(value):
            return value
        target = configurable_of(type(value))
        if target is None:
            return _OMIT
        if not target.parameters:
            return Reference(target, ())
        if not dataclasses.is_dataclass(value):
            return _OMIT
        while "/".join((*scopes, name)) in taken:
            name += "_"
        inner = (*scopes, name)
        taken.add("/".join(inner))
        add(Call(target, inner, {field: getattr(value, field) for field in target.parameters}))
        return Reference(target, inner)

    def add(call: Call) -> None:
        key = ("/".join(call.scopes), call.target.selector)
        arguments: dict[str, Any] = {}
        spelled[key] = Call(call.target, call.scopes, arguments)
        for argument, value in call.arguments.items():
            value = value_of(value, call.scopes, f"{call.target.name}_{argument}")
            if value is not _OMIT:
                arguments[argument] = value

    for call in calls.values():
        add(call)
    return spelled


def _from_root(calls: dict[Key, Call], macros: dict[str, Any]) -> list[Key]:
    """The keys of all calls, users first: the same order however the job was written."""
    order: dict[Key, None] = {}

    def walk(value: Any, scopes: tuple[str, ...]) -> None:
        if isinstance(value, Macro):
            walk(macros["/".join(value.scopes)], value.scopes)
        elif isinstance(value, Reference):
            visit(("/".join(value.scopes or scopes), value.target.selector))
        elif isinstance(value, tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                walk(item, scopes)

    def visit(key: Key) -> None:
        if key in calls and key not in order:  # a default without fields has no call
            order[key] = None
            for value in calls[key].arguments.values():
                walk(value, calls[key].scopes)

    visit(next(iter(calls)))
    return list(order)


def _writable(value: Any) -> bool:
    try:
        written(value)
    except ValueError:
        return False
    return True


def _line(name: str, value: Any) -> str:
    line = f"{name} = {written(value)}"
    if len(line) <= WIDTH or not isinstance(value, tuple):
        return line
    return f"{name} = (\n" + "".join(f"    {written(item)},\n" for item in value) + ")"
