"""Which axes of devices cut which logical axes: the one place that says so.

| logical axis | cut over |
| expert | node and expert, always: a bank that they do not divide is an error |
| expert_hidden | model, always |
| hidden, heads, vocab | model, where it divides them |
| embed | fsdp, where it divides it |
| rows of a batch | data, fsdp, node, expert, as many of them as divide it |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.core import SpecError, axes, check_that, spec
from moejax.mesh.spec import AXES, BANK_AXES, FSDP, MODEL, TOKEN_AXES

MeshLike = Mesh | AbstractMesh
_MUST = {axes.EXPERT: "experts", axes.EXPERT_HIDDEN: "hidden units of an expert, or their groups"}


@spec
class Rules:
    """Logical axis -> mesh axes, the ones named first before the others.

    embed: what cuts the model width of parameters between uses; ("fsdp", "node", "expert") cuts
    what is no expert over the devices of expert parallelism too, as training a large model wants.
    """

    embed: tuple[str, ...] = (FSDP,)

    def check(self) -> None:
        known = set(self.embed) <= set(AXES) and len(set(self.embed)) == len(self.embed)
        check_that(known, self, "embed", f"Choose among {', '.join(AXES)}, each once.")

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """What a logical axis is cut over; nothing where no rule names it."""
        table = {
            axes.EXPERT: BANK_AXES,
            axes.EXPERT_HIDDEN: (MODEL,),
            axes.HIDDEN: (MODEL,),
            axes.HEADS: (MODEL,),
            axes.VOCAB: (MODEL,),
            axes.EMBED: self.embed,
        }
        return table.get(logical or "", ())

    def partition(
        self, shape: Sequence[int], logical: Sequence[str | None], sizes: Mapping[str, int]
    ) -> P:
        """`cut` as a PartitionSpec."""
        return P(*(part or None for part in self.cut(shape, logical, sizes)))

    def cut(
        self, shape: Sequence[int], logical: Sequence[str | None], sizes: Mapping[str, int]
    ) -> tuple[tuple[str, ...], ...]:
        """What each axis of an array is cut over on a mesh of these sizes (`MeshSpec.shape`).

        An axis of devices serves once per array, and only where it has more than one device.
        SpecError where experts or their hidden units cannot be cut evenly.
        """
        taken: set[str] = set()
        # What must be cut goes first: a lenient axis takes only what is left.
        order = sorted(range(len(shape)), key=lambda i: logical[i] not in _MUST)
        found: dict[int, tuple[str, ...]] = {}
        for i in order:
            wanted = [a for a in self.mesh_axes(logical[i]) if a not in taken and sizes[a] > 1]
            if logical[i] in _MUST:
                _check_divides(shape[i], str(logical[i]), wanted, sizes)
            chosen = _dividing(shape[i], wanted, sizes)
            taken |= set(chosen)
            found[i] = chosen
        return tuple(found[i] for i in range(len(shape)))


def batch_axes(rows: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes that the rows of a batch are cut over: as many as divide them, in mesh order."""
    return _dividing(rows, [axis for axis in TOKEN_AXES if sizes[axis] > 1], sizes)


def batch_sharding(mesh: MeshLike, rows: int) -> NamedSharding:
    """Of an array led by the rows of a batch: tokens_BxS, hidden states, masks."""
    return NamedSharding(mesh, P(batch_axes(rows, mesh.shape) or None))


def _dividing(size: int, wanted: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The longest beginning of `wanted` that cuts `size` evenly."""
    for count in range(len(wanted), 0, -1):
        if size and size % math.prod(sizes[axis] for axis in wanted[:count]) == 0:
            return tuple(wanted[:count])
    return ()


def _check_divides(
    size: int, logical: str, wanted: Sequence[str], sizes: Mapping[str, int]
) -> None:
    taken = 1
    for axis in wanted:
        taken *= sizes[axis]
        if size % taken:
            raise SpecError(
                f"MeshSpec.{axis} = {sizes[axis]} does not divide the {size} {_MUST[logical]}"
                f"{f' ({taken} parts)' if taken != sizes[axis] else ''}.",
                f"Choose a divisor of {size}.",
                field=axis,
            )
