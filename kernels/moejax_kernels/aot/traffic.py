"""What a program sends between devices: by kind, by axes of the mesh, loops counted."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from moejax_kernels.aot.hlo import COLLECTIVES, GROUPS
from moejax_kernels.aot.program import Array, Instruction, Program

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(?([^)]*)\)?)?\s*\{(.*)\}")
_SUB_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?$")
_CONTINUES = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective op and how often it runs.

    size: the largest of what one device gives and gets, in bytes; wire: what leaves one device over
    its links in one run, by the algorithm that moves least; times: runs. axes: of the mesh, over
    which its groups reach, "+" between them; "" where they are no axes. devices: in one group.
    scope: where JAX traced it.
    """

    name: str
    kind: str
    size: float
    wire: float
    times: float
    axes: str
    devices: int
    scope: str

    @property
    def total(self) -> float:
        """Bytes that leave a device in the whole program."""
        return self.wire * self.times


def transfers(program: Program, mesh: Sequence[tuple[str, int]]) -> tuple[Transfer, ...]:
    """Every collective that runs. mesh: (axis, size), outermost first, devices numbered so.

    An asynchronous collective is counted where it starts. A ragged all-to-all counts as many rows
    as one device holds when every expert gets equally many.
    """
    found = []
    devices = math.prod(size for _, size in mesh)
    scattered: set[str] = set()  # computations that are a reduce-scatter as a whole
    for _, one, _, _ in program.each():
        if one.opcode == "fusion" and "all-reduce-scatter" in one.rest:
            scattered |= set(re.findall(r"calls=%?([\w.\-]*all-reduce-scatter[\w.\-]*)", one.rest))
    for computation, one, times, fused in program.each():
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or (fused and _CONTINUES.search(one.rest)):
            continue
        if computation in scattered and kind == "all-reduce":
            kind = "reduce-scatter"
        groups = device_groups(one.rest, devices)
        size = _size(program, computation, one, kind)
        n = len(groups[0]) if groups else 1
        if kind == "collective-permute":
            n = 2  # each pair is one sender and one receiver
        axes = mesh_axes(groups, mesh)
        wire = _wire(kind, size, n)
        found.append(Transfer(one.name, kind, size, wire, times, axes, n, one.scope))
    return tuple(found)


def device_groups(text: str, devices: int) -> list[list[int]]:
    """The groups of device numbers that an op's attributes name; one of all where none is."""
    match = GROUPS.search(text)
    written = match[1] if match else "{}"
    if written == "{}":
        return [list(range(devices))]
    if written.startswith("{{"):
        inner = written[1:-1]
        return [[int(i) for i in g.split(",") if i] for g in re.findall(r"\{([^}]*)\}", inner)]
    if iota := _IOTA.match(written):
        shape, order = _ints(iota[1]), _ints(iota[2])
        ids = np.arange(math.prod(order)).reshape(order)
        if iota[3]:
            ids = ids.transpose(_ints(iota[3]))
        return ids.reshape(shape).tolist()
    return _of_mesh(written)


def mesh_axes(groups: Sequence[Sequence[int]], mesh: Sequence[tuple[str, int]]) -> str:
    """The axes along which devices of one group differ: "fsdp+expert"; "" for other groups."""
    sizes = [size for _, size in mesh]
    if not groups or max(map(max, groups)) >= math.prod(sizes):
        return ""
    differ: set[int] = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        differ |= {axis for axis in range(len(sizes)) if len(set(places[axis].tolist())) > 1}
    return "+".join(mesh[axis][0] for axis in sorted(differ))


def summed(found: Iterable[Transfer]) -> dict[tuple[str, str], tuple[float, float]]:
    """(kind, axes) -> (runs, bytes that leave a device), largest first."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for one in found:
        runs, size = sums.get((one.kind, one.axes), (0.0, 0.0))
        sums[one.kind, one.axes] = (runs + one.times, size + one.total)
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def _wire(kind: str, size: float, n: int) -> float:
    """Bytes out of a device: rings for gathers and reductions, direct sends for the rest."""
    if kind == "collective-permute":
        return size
    share = (n - 1) / n
    return (2 if kind == "all-reduce" else 1) * size * share


def _size(program: Program, computation: str, one: Instruction, kind: str) -> float:
    operands = [sum(a.bytes for a in o.arrays) for o in program.operands(computation, one)]
    if kind == "ragged-all-to-all":  # of rows and the buffer for them, one has room for all
        return min(operands[:2])
    return max(sum(operands), sum(array.bytes for array in _results(one)))


def _results(one: Instruction) -> tuple[Array, ...]:
    if not one.opcode.endswith("-start") or one.opcode == "all-reduce-start":
        return one.arrays
    arrays = tuple(array for array in one.arrays if array.dims)  # operands, then results
    return arrays[len(arrays) // 2 :]


def _of_mesh(written: str) -> list[list[int]]:
    match = _MESH.match(written)
    if match is None:
        return []
    names, sizes = [], []
    for part in match[1].split(","):
        name, _, size = part.strip().partition("=")
        names.append(name.strip("'"))
        sizes.append(int(size))
    ids = np.arange(math.prod(sizes))
    if match[2]:
        ids = np.asarray([int(i) for i in re.findall(r"\d+", match[2])][: ids.size])
    ids = ids.reshape(sizes)
    axis = 0
    chosen: list[int] = []
    wanted = {}
    for part in filter(None, (p.strip() for p in match[3].split(","))):
        found = _SUB_AXIS.match(part)
        if found is None:
            return []
        wanted[found[1]] = (int(found[2]), int(found[3])) if found[2] else None
    shape: list[int] = []
    for name, size in zip(names, sizes, strict=True):
        if name in wanted and wanted[name] is not None:
            before, of = wanted[name]  # type: ignore[misc]
            shape += [before, of, size // before // of]
            chosen.append(axis + 1)
            axis += 3
            continue
        shape.append(size)
        if name in wanted:
            chosen.append(axis)
        axis += 1
    ids = ids.reshape(shape)
    rest = [i for i in range(ids.ndim) if i not in chosen]
    width = math.prod(shape[i] for i in chosen)
    return ids.transpose(*rest, *chosen).reshape(-1, width).tolist()


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
