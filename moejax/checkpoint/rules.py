"""Name maps as data: which tensors on disk a parameter is made of, and back.

A rule pairs parameter names with one tensor name of a file, both with `{l}` for the layer:

    Rule("layers.{l}.attention.q", "model.layers.{l}.self_attn.q_proj.weight", Transposed())

Where the tensor's name has `{e}`, each expert has a tensor of its own; parameters below
`moe.experts` otherwise come from one tensor that leads with the experts' axis. Several parameters
in one rule lie side by side in one tensor; several tensors in one rule are equal parts of one, cut
along its first axis. Whatever a rule reads it can write: every step is invertible. Steps see one
expert at a time, without its axis, so that a bank never exists twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moejax.models import AttentionSpec, LayerSpec, ModelSpec

_EXPERTS = ".moe.experts."


@dataclass(frozen=True)
class Place:
    """Where a parameter stands: the model's spec and the index of the layer, None outside."""

    spec: ModelSpec
    layer: int | None

    @property
    def block(self) -> int | None:
        """The layer's number in the files: one without a mixer belongs to the block below it, as
        its second feed-forward (OpenMoE)."""
        if self.layer is None:
            return None
        below = self.spec.layers[: self.layer + 1]
        return sum(layer.mixer is not None for layer in below) - 1


class Step(Protocol):
    """An invertible change of one matrix or vector; cheap, on views where that is possible."""

    def forward(self, x: np.ndarray, place: Place) -> np.ndarray:
        """From the file's layout towards moejax's."""
        ...

    def inverse(self, x: np.ndarray, place: Place) -> np.ndarray:
        """From moejax's layout towards the file's."""
        ...


@dataclass(frozen=True)
class Transposed:
    """[N, K] on disk, as torch keeps a linear map, is [K, N] here."""

    def forward(self, x: np.ndarray, place: Place) -> np.ndarray:
        return x.T

    def inverse(self, x: np.ndarray, place: Place) -> np.ndarray:
        return x.T


@dataclass(frozen=True)
class PairsToHalves:
    """Columns of rotary heads of width W: pairs (2i, 2i+1) on disk are (i, i + W/2) here.

    For files whose rotary positions turn neighbours; W is the mixer's head_width.
    """

    def forward(self, x: np.ndarray, place: Place) -> np.ndarray:
        paired = x.reshape(*x.shape[:-1], -1, self._width(place) // 2, 2)
        return paired.swapaxes(-1, -2).reshape(x.shape)

    def inverse(self, x: np.ndarray, place: Place) -> np.ndarray:
        halved = x.reshape(*x.shape[:-1], -1, 2, self._width(place) // 2)
        return halved.swapaxes(-1, -2).reshape(x.shape)

    def _width(self, place: Place) -> int:
        assert place.layer is not None
        mixer = place.spec.layers[place.layer].mixer
        assert isinstance(mixer, AttentionSpec)
        return mixer.head_width


class Split(Protocol):
    """How several parameters share a tensor, along its last axis once the steps are done."""

    def part(self, x: np.ndarray, index: int, sizes: Sequence[int]) -> np.ndarray: ...

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray: ...


@dataclass(frozen=True)
class Consecutive:
    """One behind the other."""

    def part(self, x: np.ndarray, index: int, sizes: Sequence[int]) -> np.ndarray:
        start = sum(sizes[:index])
        return x[..., start : start + sizes[index]]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


@dataclass(frozen=True)
class Interleaved:
    """Taken in turn: a b a b ... (gpt-oss keeps gate and up so)."""

    def part(self, x: np.ndarray, index: int, sizes: Sequence[int]) -> np.ndarray:
        return x[..., index :: len(sizes)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)


class Rule:
    """Parameters <-> one tensor of a file, or several that make one. Immutable.

    parameters: one name pattern, or several that share the tensor. steps: from the file to moejax,
    in order. split: how several parameters share it. joined: experts follow each other along the
    leading axis of the tensor, [E * F, D], instead of having an axis of their own. layers: which
    layers the rule is for, where a parameter's tensor depends on it; None for all.
    """

    def __init__(
        self,
        parameters: str | tuple[str, ...],
        tensor: str | tuple[str, ...],
        *steps: Step,
        split: Split = Consecutive(),
        joined: bool = False,
        layers: Callable[[LayerSpec], bool] | None = None,
    ):
        self.parameters = (parameters,) if isinstance(parameters, str) else parameters
        self.tensors = (tensor,) if isinstance(tensor, str) else tensor
        self.steps, self.split, self.joined, self.layers = steps, split, joined, layers
        self.of_experts = _EXPERTS in self.parameters[0]
        self.named_experts = "{e}" in self.tensors[0]
        assert len(self.tensors) == 1 or not self.of_experts, "experts lie in one tensor, or each"

    def __repr__(self) -> str:
        return f"Rule({' + '.join(self.parameters)} <-> {self.tensor})"

    @property
    def tensor(self) -> str:
        """The tensor's name pattern, or those of all that make it."""
        return " + ".join(self.tensors)

    def applies(self, place: Place) -> bool:
        """Whether the rule is for the layer that stands there."""
        if self.layers is None or place.layer is None:
            return True
        return self.layers(place.spec.layers[place.layer])

    def match(self, name: str) -> tuple[int, int | None] | None:
        """(which of the rule's parameters `name` is, its layer); None if it is none of them."""
        for index, pattern in enumerate(self.parameters):
            if (found := matched(pattern, name)) is not None:
                return index, int(found["l"]) if "l" in found else None
        return None

    def forward(self, x: np.ndarray, index: int, sizes: Sequence[int], place: Place) -> np.ndarray:
        """Parameter `index` (of one expert) in a tensor (of that expert)."""
        for step in self.steps:
            x = step.forward(x, place)
        return self.split.part(x, index, sizes)

    def inverse(self, parts: Sequence[np.ndarray], place: Place) -> np.ndarray:
        """The tensor (of one expert) that holds these parameters (of that expert)."""
        x = self.split.join(parts)
        for step in reversed(self.steps):
            x = step.inverse(x, place)
        return x

    def shape(self, shapes: Sequence[tuple[int, ...]], place: Place) -> tuple[int, ...]:
        """Shape of the tensor (of one expert) for parameters (of one expert) of these shapes."""
        joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        x = np.broadcast_to(np.zeros((), np.uint8), joined)  # no memory of its own
        for step in reversed(self.steps):
            x = step.inverse(x, place)
        return x.shape


@dataclass(frozen=True)
class Ignored:
    """Tensors of a file that the model does not need, and why.

    tensor: a pattern; `{l}` is any layer, `{beyond}` a layer after the model's last, `*` any text.
    beside: a tensor without which the files hold no such thing, with the same numbers: it tells a
    layer of another kind from one that a config with too few layers would lose.
    """

    tensor: str
    why: str
    beside: str | None = None

    def match(self, name: str, layers: int, tensors: Container[str]) -> bool:
        """Whether this is the reason to leave `name` alone, in a model of so many layers."""
        found = matched(self.tensor, name)
        if found is None or int(found.get("beyond", layers)) < layers:
            return False
        return self.beside is None or self.beside.format(**found) in tensors


def transposed(names: dict[str, str]) -> tuple[Rule, ...]:
    """A rule per linear map: parameter -> tensor, transposed."""
    return tuple(Rule(parameter, tensor, Transposed()) for parameter, tensor in names.items())


def copied(names: dict[str, str]) -> tuple[Rule, ...]:
    """A rule per tensor that is the same on disk: vectors, embeddings."""
    return tuple(Rule(parameter, tensor) for parameter, tensor in names.items())


def matched(pattern: str, name: str) -> dict[str, str] | None:
    """The numbers that stand for {l}, {e}, {beyond} in `name`, None if it does not fit."""
    found = _expression(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


_EXPRESSIONS: dict[str, re.Pattern[str]] = {}


def _expression(pattern: str) -> re.Pattern[str]:
    if pattern not in _EXPRESSIONS:
        text = re.escape(pattern).replace(r"\*", ".*")
        for hole in ("l", "e", "beyond"):
            text = text.replace(rf"\{{{hole}\}}", rf"(?P<{hole}>0|[1-9][0-9]{{0,8}})")
        _EXPRESSIONS[pattern] = re.compile(text)
    return _EXPRESSIONS[pattern]
