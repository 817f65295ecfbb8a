"""How many bytes of an array lie on each device of a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moejax.core import SpecError
from moejax.core.axes import EXPERT
from moejax.mesh.spec import MeshSpec


def bytes_per_device(
    shape: Sequence[int], axes: Sequence[str | None], itemsize: int, mesh: MeshSpec
) -> int:
    """Bytes on one device of an array whose axes have these logical names.

    The expert axis is cut over `expert`, then the whole over `fsdp` along the longest axis that
    this divides; what it divides nowhere lies on every device.
    Raises SpecError where `expert` does not divide the experts.
    """
    local = list(shape)
    for axis, name in enumerate(axes):
        if name != EXPERT:
            continue
        if local[axis] % mesh.expert:
            raise SpecError(
                f"MeshSpec.expert = {mesh.expert} does not divide the {local[axis]} experts.",
                "Choose a divisor of the number of experts.",
                field="expert",
            )
        local[axis] //= mesh.expert
    cut = any(size and size % mesh.fsdp == 0 for size in local)
    return math.prod(local) // (mesh.fsdp if cut else 1) * itemsize
