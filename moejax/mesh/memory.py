"""How many bytes of an array lie on each device of a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moejax.mesh.rules import Rules
from moejax.mesh.spec import MeshSpec


def bytes_per_device(
    shape: Sequence[int],
    axes: Sequence[str | None],
    itemsize: int,
    mesh: MeshSpec,
    rules: Rules = Rules(),
) -> int:
    """Bytes on one device of an array whose axes have these logical names.

    Raises SpecError where the mesh does not divide experts or their hidden units.
    """
    sizes = mesh.shape
    parts = math.prod(sizes[axis] for cut in rules.cut(shape, axes, sizes) for axis in cut)
    return math.prod(shape) // parts * itemsize
