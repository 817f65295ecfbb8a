"""Builds the job: every reference becomes an object, every error gets the line that caused it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from moejax.config.errors import located, owner_of
from moejax.config.reader import Bindings, Key
from moejax.config.registry import Configurable
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
from moejax.core.errors import ConfigError, MoejaxError, SpecError


@dataclass(frozen=True)
class Call:
    """One object of a config: what was asked for in which scope, with which values as written.

    arguments: parameter -> value as bound, or the default; in the order of the signature. Literals
    are as the object keeps them.
    """

    target: Configurable
    scopes: tuple[str, ...]
    arguments: dict[str, Any]


class Injection:
    """Builds objects from bindings with gin's rules of scope; the same reference is built once.

    calls: every object built, users before what they use. macros: name -> value as written.
    seen: keys of bindings that some object was offered. effective: (key, parameter) that was used.
    """

    def __init__(self, bindings: Bindings):
        self.bindings = bindings
        self.calls: dict[Key, Call] = {}
        self.macros: dict[str, Any] = {}
        self.seen: set[Key] = set()
        self.effective: set[tuple[Key, str]] = set()
        self._objects: dict[Key, Any] = {}
        self._expanding: list[Macro] = []

    def build(self, target: Configurable, scopes: tuple[str, ...], where: Location) -> Any:
        """The object of `target` in `scopes`, used at `where`.

        Raises ConfigError for a missing value, a wrong type, an impossible spec, a circle.
        """
        key = ("/".join(scopes), target.selector)
        if key in self._objects:
            return self._objects[key]
        if key in self.calls:
            raise ConfigError(
                f"{where}: {target.name} is part of itself.", "Give one of them its own scope."
            )
        bound = self._offered(scopes, target.selector)
        arguments = {
            name: bound[name].value if name in bound else parameter.default
            for name, parameter in target.parameters.items()
        }
        self.calls[key] = Call(target, scopes, arguments)
        for name, value in arguments.items():
            if value is REQUIRED or value is inspect.Parameter.empty:
                raise _missing(target, scopes, name, bound[name].where if name in bound else where)
        given = {
            name: self._value(bound[name].value, scopes, bound[name].where)
            for name in target.parameters
            if name in bound
        }
        built = self._call(target, given, bound, where)
        if type(built) is target.target:  # a spec may store 3 as 3.0: one job, one text
            for name, value in arguments.items():
                if not names_objects(value):
                    arguments[name] = getattr(built, name, value)
        self._objects[key] = built
        return built

    def _call(
        self,
        target: Configurable,
        given: dict[str, Any],
        bound: dict[str, Bound],
        where: Location,
    ) -> Any:
        try:
            return target.target(**given)
        except SpecError as error:
            name = error.field.partition("[")[0]
            own = owner_of(error) == target.name or not isinstance(target.target, type)
            if name not in bound or not own:
                raise located(error, self.bindings.line_of(error) or where) from error
            fix = error.fix
            if _expects_tuple(target, name) and not isinstance(given[name], tuple):
                fix = "A tuple of one item needs a comma: (@Name(),)."
            raise located(SpecError(error.problem, fix), self._origin(bound[name])) from error
        except MoejaxError as error:
            raise located(error, where) from error
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: {target.name} cannot be built: {error}.",
                f"Check the values of {', '.join(f'{target.name}.{name}' for name in given)}.",
            ) from error

    def _value(self, value: Any, scopes: tuple[str, ...], where: Location) -> Any:
        """The object that a value as written stands for."""
        if isinstance(value, Reference):
            return self.build(value.target, value.scopes or scopes, where)
        if isinstance(value, Macro):
            if value in self._expanding:
                name = "/".join(value.scopes)
                raise ConfigError(f"{where}: %{name} is part of itself.", f"Give {name} a value.")
            self._expanding.append(value)
            bound = self._macro(value, where)
            # As in gin, a macro's value is built in the scope that bears the macro's name.
            built = self._value(bound.value, value.scopes, bound.where)
            self._expanding.pop()
            return built
        if isinstance(value, tuple):
            return tuple(self._value(item, scopes, where) for item in value)
        if isinstance(value, dict):
            return {key: self._value(item, scopes, where) for key, item in value.items()}
        return value

    def _macro(self, macro: Macro, where: Location) -> Bound:
        name = "/".join(macro.scopes)
        bound = self._offered(macro.scopes, MACRO).get("value")
        if bound is None or bound.value is REQUIRED:
            raise ConfigError(
                f"{bound.where if bound else where}: %{name} has no value.",
                f"Add a line {name} = ..., or give --set {name}=...",
            )
        self.macros.setdefault(name, bound.value)
        return bound

    def _origin(self, bound: Bound) -> Location:
        """The line to mend: that of the macro where the binding only names one."""
        while isinstance(bound.value, Macro):
            bound = self._macro(bound.value, bound.where)
        return bound.where

    def _offered(self, scopes: tuple[str, ...], selector: str) -> dict[str, Bound]:
        self.seen.update(("/".join(scopes[:n]), selector) for n in range(len(scopes) + 1))
        visible = self.bindings.visible(scopes, selector)
        self.effective.update((key, name) for name, (key, _) in visible.items())
        return {name: bound for name, (_, bound) in visible.items()}


def check_all_used(bindings: Bindings, injection: Injection) -> None:
    """ConfigError for the first binding the user wrote that took no part in the job.

    What included files bind is exempt: a shared file may serve several jobs. On the command line a
    binding must take effect; in the file it may be overridden by a scope, and by a command line
    that builds other objects.
    """
    lenient = {Origin.INCLUDE, Origin.FILE} if bindings.restructured else {Origin.INCLUDE}
    for key, arguments in bindings.by_key.items():
        for name, bound in arguments.items():
            origin = bound.where.origin
            overridden = key in injection.seen and (key, name) not in injection.effective
            if origin in lenient or (overridden and origin is Origin.FILE):
                continue
            if key not in injection.seen or overridden:
                raise _unused(key, name, bound.where, injection)


def _unused(key: Key, name: str, where: Location, injection: Injection) -> ConfigError:
    scope, selector = key
    short = selector.rpartition(".")[2]
    if selector == MACRO:
        used = ", ".join(f"%{macro}" for macro in injection.macros) or "none"
        return ConfigError(
            f"{where}: {scope} is never used.", f"The macros this config uses: {used}."
        )
    scopes = sorted({s for s, other in injection.calls if other == selector})
    if not scopes:
        return ConfigError(
            f"{where}: {short}.{name} has no effect: this config builds no {short}.",
            f"Refer to it with @{scope + '/' if scope else ''}{short}(), or remove the line.",
        )
    used = ", ".join(f"{s + '/' if s else ''}{short}" for s in scopes)
    what = "is overridden everywhere" if key in injection.seen else "has no effect"
    return ConfigError(
        f"{where}: {scope + '/' if scope else ''}{short}.{name} {what}.",
        f"This config builds {used}: bind there, or remove the line.",
    )


def _missing(
    target: Configurable, scopes: tuple[str, ...], name: str, where: Location
) -> ConfigError:
    annotation = target.parameters[name].annotation
    kind = "" if annotation is inspect.Parameter.empty else f" ({_type_name(annotation)})"
    scope = "/".join((*scopes, ""))
    return ConfigError(
        f"{where}: {target.name} is built without {name}{kind}.",
        f"Add a line {scope}{target.name}.{name} = ...",
    )


def _expects_tuple(target: Configurable, name: str) -> bool:
    return _type_name(target.parameters[name].annotation).startswith("tuple")


def _type_name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
