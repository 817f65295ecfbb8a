"""How many bytes of a model lie on each device of a mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from moejax.core import SpecError
from moejax.mesh.spec import MeshSpec


class Stored(NamedTuple):
    """An array of a model: of_experts, whether its first axis is the experts'."""

    shape: tuple[int, ...]
    itemsize: int
    of_experts: bool


def bytes_per_device(arrays: Iterable[Stored], mesh: MeshSpec) -> int:
    """Bytes of the arrays on one device.

    Arrays of experts are cut over `expert`, and every array over `fsdp` along one axis that
    this divides; what it divides nowhere lies on every device.
    Raises SpecError where `expert` does not divide the experts.
    """
    total = 0
    for array in arrays:
        shape = list(array.shape)
        if array.of_experts:
            if shape[0] % mesh.expert:
                raise SpecError(
                    f"MeshSpec.expert = {mesh.expert} does not divide the {shape[0]} experts.",
                    "Choose a divisor of the number of experts.",
                    field="expert",
                )
            shape[0] //= mesh.expert
        parts = mesh.fsdp if any(n % mesh.fsdp == 0 for n in shape) else 1
        total += math.prod(shape) // parts * array.itemsize
    return total
