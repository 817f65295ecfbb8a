"""config.json of a model, read field by field: what is missing or unknown has an error of its name.

A field that changes the model's function and is not understood is an error, never ignored: each
family reads every such field, if only to `require` the one value it supports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from moejax.core import CheckpointError
from moejax.moe import GELU, Activation, ReLU, SiLU

T = TypeVar("T")
_NEEDED: Any = object()
_DEEPEST = 4096
_LARGEST = 1e30  # of a number that a config means

ACTIVATIONS: dict[str, Activation] = {
    "silu": SiLU(),
    "swish": SiLU(),
    "gelu": GELU(),
    "gelu_new": GELU(approximate=True),
    "gelu_pytorch_tanh": GELU(approximate=True),
    "relu": ReLU(),
}


class ConfigReader:
    """A table of fields. where: how errors name it. read: the fields asked for so far.

    A default stands for a field that is missing or null; without one, that is an error.
    """

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json"):
        self._fields = fields
        self.where = where
        self.read: set[str] = set()

    def raw(self, name: str) -> Any:
        """The field as it stands, None where there is none."""
        self.read.add(name)
        return self._fields.get(name)

    def has(self, name: str) -> bool:
        """Whether the field is there, null or not."""
        self.read.add(name)
        return name in self._fields

    def integer(self, name: str, default: int = _NEEDED, most: int = 1 << 20) -> int:
        """A whole number from 0 to `most`, beyond which it is no size of a model but damage."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            self.refuse(name, f"a whole number from 0 to {most}")
        return value

    def number(self, name: str, default: float = _NEEDED) -> float:
        """A finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "a number")
        if not abs(value) < _LARGEST:
            self.refuse(name, "a finite number")
        return float(value)

    def optional_integer(self, name: str) -> int | None:
        """A whole number; None where the field is missing or null."""
        return None if self.raw(name) is None else self.integer(name)

    def optional_number(self, name: str) -> float | None:
        """A finite number; None where the field is missing or null."""
        return None if self.raw(name) is None else self.number(name)

    def depth(self, name: str) -> int:
        """A number of layers, from 1 to what any model has: damage must not fill memory."""
        depth = self.integer(name, most=_DEEPEST)
        if depth < 1:
            self.refuse(name, "at least 1")
        return depth

    def uniform(self, name: str, default: int = _NEEDED) -> int:
        """A whole number, given once or as a list of equal ones for every layer."""
        value = self._value(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return ConfigReader({name: value[0]}, self.where).integer(name)
        return self.integer(name, default)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """So many finite numbers."""
        values = self._value(name, _NEEDED)
        plain = isinstance(values, list) and len(values) == count
        if not plain or not all(type(v) in (int, float) and abs(v) < _LARGEST for v in values):
            self.refuse(name, f"{count} numbers")
        return tuple(map(float, values))

    def flag(self, name: str, default: bool = _NEEDED) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: str = _NEEDED) -> T:
        """What `choices` has for the field's text."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, f"one of {', '.join(choices)}")
        return choices[value]

    def activation(self, name: str = "hidden_act", default: str = _NEEDED) -> Activation:
        """An activation by its name in transformers."""
        return self.choice(name, ACTIVATIONS, default)

    def require(self, name: str, *supported: Any) -> None:
        """Refuses any value but these; a missing field or null passes."""
        value = self.raw(name)
        if value is not None and value not in supported:
            self.refuse(name, " or ".join(map(repr, supported)) if supported else "nothing")

    def table(self, name: str) -> ConfigReader | None:
        """A field that is a table itself; None where it is missing or null."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "a table of fields")
        return ConfigReader(value, f"{self.where}, {name}")

    def needed_table(self, name: str) -> ConfigReader:
        """A field that is a table itself."""
        self._value(name, _NEEDED)
        table = self.table(name)
        assert table is not None
        return table

    def rope(self) -> ConfigReader:
        """rope_type, rope_theta and what belongs to them, wherever the config keeps them.

        transformers 5 writes them into `rope_parameters`; older ones rope_theta beside
        `rope_scaling`, whose type was once called `type`, and which goes first where both are.
        """
        found: dict[str, Any] = {"rope_theta": self.raw("rope_theta")}
        for name in ("rope_parameters", "rope_scaling"):
            if (inner := self.raw(name)) is None:
                continue
            if not isinstance(inner, dict) or any(isinstance(v, dict) for v in inner.values()):
                self.refuse(name, "one table of fields for all layers")
            found = {"rope_theta": self.raw("rope_theta")} | inner if inner else found
        found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
        return ConfigReader(found, f"{self.where}, rotary positions")

    def unread(self) -> list[str]:
        """Fields that were not asked for."""
        return sorted(set(self._fields) - self.read)

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raises CheckpointError: the field has a value moejax cannot honour."""
        value = repr(self._fields.get(name))
        raise CheckpointError(
            f"{self.where}: {name} = {value[:100]} is not supported here.",
            f"moejax knows it as {expected}.",
        )

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None:
            value = default
        if value is _NEEDED:
            raise CheckpointError(
                f"{self.where} has no field {name}.", "Is it the config of the same model?"
            )
        return value
