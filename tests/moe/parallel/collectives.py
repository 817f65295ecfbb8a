"""The collectives of a lowered program, read from its StableHLO before any compiler pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxlib.mlir import ir

from moejax.mesh import AXES, MeshSpec

KINDS = {
    "stablehlo.all_gather": "all_gather",
    "stablehlo.all_reduce": "all_reduce",
    "stablehlo.all_to_all": "all_to_all",
    "stablehlo.reduce_scatter": "reduce_scatter",
    "stablehlo.collective_permute": "collective_permute",
}


def collectives(lowered: Any, mesh: MeshSpec) -> list[tuple[str, str, list[int], str]]:
    """(kind, mesh axes, shape of an operand, its dtype) of each; those among one device left out.

    A function that is called twice counts twice.
    """
    module = lowered.compiler_ir("stablehlo")
    functions = {
        op.attributes["sym_name"].value: op
        for op in module.body.operations
        if op.operation.name == "func.func"
    }
    groups = _groups(mesh)
    found = []
    for op in _walk(functions["main"], functions):
        name = op.name
        ragged = name == "stablehlo.custom_call" and "ragged_all_to_all" in str(
            op.attributes["call_target_name"]
        )
        if name not in KINDS and not ragged:
            continue
        shape = op.operands[0].type
        found.append(
            (
                "ragged_all_to_all" if ragged else KINDS[name],
                _axes_of(op, ragged, groups),
                list(shape.shape),
                str(shape.element_type),
            )
        )
    return sorted(one for one in found if one[1])


def _walk(op: Any, functions: dict[str, Any]) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                if inner.operation.name == "func.call":
                    yield from _walk(functions[inner.attributes["callee"].value], functions)
                else:
                    yield from _walk(inner.operation, functions)


def _groups(mesh: MeshSpec) -> dict[frozenset, str]:
    """The partition of devices that a set of mesh axes makes -> their names."""
    sizes = [mesh.shape[axis] for axis in AXES]
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    real = [i for i, size in enumerate(sizes) if size > 1]
    found: dict[frozenset, str] = {}
    for count in range(len(real) + 1):
        for chosen in itertools.combinations(real, count):
            rest = [i for i in range(len(sizes)) if i not in chosen]
            table = ids.transpose(*rest, *chosen).reshape(-1, *[sizes[i] for i in chosen])
            parts = frozenset(frozenset(row.reshape(-1).tolist()) for row in table)
            found[parts] = " ".join(AXES[i] for i in chosen)
    return found


def _axes_of(op: Any, ragged: bool, groups: dict[frozenset, str]) -> str:
    if op.name == "stablehlo.collective_permute":
        return "?"
    held = ir.DictAttr(op.attributes["backend_config"]) if ragged else op.attributes
    table = np.array(ir.DenseElementsAttr(held["replica_groups"]))
    return groups[frozenset(frozenset(int(i) for i in row if i >= 0) for row in table)]
