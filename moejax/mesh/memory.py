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
    cuts = [part or () for part in rules.partition(shape, axes, sizes)]
    parts = math.prod(sizes[axis] for cut in cuts for axis in cut)
    return math.prod(shape) // parts * itemsize
