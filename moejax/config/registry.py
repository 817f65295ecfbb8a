"""Which names a gin file may use: every `@spec` class of moejax, and the builders listed here.

The classes are found by reading moejax's source files, not by importing them: a config imports only
the folders that it names, so that an error in it shows at once.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import moejax
from moejax.config.errors import nearest
from moejax.core.errors import ConfigError
from moejax.core.spec import known_specs

BUILDERS = {  # name -> module:attribute, for what is no spec
    "run": "moejax.config.builders:run",
    "repeat": "moejax.config.builders:repeat",
    "concatenate": "moejax.config.builders:concatenate",
    "even_attention": "moejax.models.attention:even_attention",
    "PipCorpus": "moejax.data.pip_corpus:PipCorpus",
    "HeldoutSample": "moejax.data.heldout:HeldoutSample",
    "ReferenceHeldout": "moejax.data.heldout:ReferenceHeldout",
    "PythonTopics": "moejax.data.python_topics:PythonTopics",
    "FolderCorpus": "moejax.data.folder_corpus:FolderCorpus",
    "load_tokenizer": "moejax.data.tokenizer:Tokenizer.load",
    "shipped_tokenizer": "moejax.data.tokenizer:shipped_tokenizer",
}


@dataclass(frozen=True)
class Configurable:
    """A name that gin files may bind and refer to."""

    name: str
    module: str
    target: Callable[..., Any]

    @property
    def selector(self) -> str:
        """The complete name, module included: what bindings are filed under."""
        return f"{self.module}.{self.name}"

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What gin files may bind, in the order of the signature."""
        return inspect.signature(self.target).parameters


def register(module_names: Iterable[str]) -> None:
    """Imports modules, so that gin files may use the `@spec` classes they define.

    A gin file does the same with `import my_lab.passes`. ConfigError when a module cannot be
    imported or defines a spec under a name that is taken.
    """
    for name in module_names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if (error.name or "").startswith("moejax."):  # a defect, not something to install
                raise
            raise ConfigError(
                f"module {name} cannot be imported: {error}.",
                f"Install {error.name or name}, or put its folder on PYTHONPATH.",
            ) from error
        except TypeError as error:
            if "two specs are named" not in str(error):
                raise
            raise ConfigError(f"{error}.", "Rename the class of your module.") from error


def lookup(selector: str) -> Configurable:
    """The configurable called `selector`: a bare name, or one with trailing parts of its module.

    Imports the module that defines it. ConfigError when none or more than one has the name.
    """
    *path, name = selector.split(".")
    places = [
        module
        for module in _modules().get(name, ())
        if f".{module}".endswith("." + ".".join(path)) or not path
    ]
    if len(places) > 1:
        raise ConfigError(
            f"{selector} is ambiguous: it is in {' and '.join(places)}.",
            f"Write {places[0].rpartition('.')[2]}.{name}.",
        )
    if not places:
        near = nearest(name, names())
        raise ConfigError(
            f"nothing is named {selector}.",
            f"Did you mean {near}?"
            if near
            else "For a class of your own, `import` its module first.",
        )
    register(places)
    if name not in BUILDERS:
        return Configurable(name, places[0], known_specs()[name])
    attribute = BUILDERS[name].partition(":")[2]
    return Configurable(name, places[0], attrgetter(attribute)(sys.modules[places[0]]))


def configurable_of(cls: type) -> Configurable | None:
    """The configurable that builds objects of just this class; None when gin files have none."""
    name = cls.__name__
    if known_specs().get(name) is not cls and name not in BUILDERS:
        return None
    found = lookup(f"{cls.__module__}.{name}")
    return found if found.target is cls else None


def names() -> list[str]:
    """All names a gin file may use."""
    return sorted(_modules())


def jobs() -> list[str]:
    """The names that `run.job` may be bound to: what moejax.jobs can run and plan."""
    return sorted(
        name
        for name, module, methods in _specs_in_source()
        if module.startswith("moejax.jobs.") and {"run", "plan"} <= methods
    )


def _modules() -> dict[str, tuple[str, ...]]:
    """name -> modules that define it, from the source of moejax and from what is imported."""
    found = dict(_source_index())
    for name, cls in known_specs().items():
        found.setdefault(name, (cls.__module__,))
    return found


@functools.cache
def _source_index() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {
        name: (place.partition(":")[0],) for name, place in BUILDERS.items()
    }
    for name, module, _ in _specs_in_source():
        found[name] = (*found.get(name, ()), module)
    return found


@functools.cache
def _specs_in_source() -> tuple[tuple[str, str, frozenset[str]], ...]:
    """(name, module, names of methods) of every `@spec` class in the files of moejax."""
    root = Path(moejax.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "@spec" not in source:
            continue
        module = ".".join(("moejax", *path.relative_to(root).with_suffix("").parts))
        for node in ast.parse(source, str(path)).body:
            if isinstance(node, ast.ClassDef) and any(map(_is_spec, node.decorator_list)):
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                place = module.removesuffix(".__init__")
                found.append((node.name, place, frozenset(methods)))
    return tuple(found)


def _is_spec(decorator: ast.expr) -> bool:
    name = decorator.attr if isinstance(decorator, ast.Attribute) else decorator
    return name == "spec" or (isinstance(name, ast.Name) and name.id == "spec")
