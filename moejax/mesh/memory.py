"""How many bytes of a model lie on each device of a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moejax import weights
from moejax.core import SpecError
from moejax.core.axes import EXPERT
from moejax.mesh.spec import MeshSpec


def bytes_per_device(
    named: Mapping[str, Any], mesh: MeshSpec, experts: Mapping[str, bool], itemsize: int
) -> int:
    """Bytes of the parameters on one device; works on ShapeDtypeStructs.

    named: weights by name. experts: whether a weight is a bank, led by the expert axis. itemsize:
    of plain arrays. Banks are cut over `expert`, and every array over `fsdp` along its longest axis
    that this divides; what it divides nowhere lies on every device.
    Raises SpecError where `expert` does not divide a bank.
    """
    total = 0
    for name, weight in named.items():
        lead = (EXPERT,) if experts[name] else ()
        rank = len(weights.shape(weight)) - len(lead)
        axes = weights.logical_axes(weight, (*lead, *(None,) * rank))
        plain = not isinstance(weight, weights.Format)
        for leaf, array in weights.flatten(weight).items():
            shape = list(array.shape)
            if axes.get(leaf, ())[:1] == (EXPERT,):
                if shape[0] % mesh.expert:
                    raise SpecError(
                        f"MeshSpec.expert = {mesh.expert} does not divide the {shape[0]} experts.",
                        "Choose a divisor of the number of experts.",
                        field="expert",
                    )
                shape[0] //= mesh.expert
            cut = max((n for n in shape if n % mesh.fsdp == 0), default=0)
            parts = mesh.fsdp if cut else 1
            total += math.prod(shape) // parts * (itemsize if plain else array.dtype.itemsize)
    return total
