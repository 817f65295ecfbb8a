"""What one device does in a program, by part of the model: flops and HBM bytes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from moejax_kernels.aot.hlo import COLLECTIVES
from moejax_kernels.aot.program import Array, Instruction, Program

_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)"[^}]*?"bytes_accessed":"(\d+)"')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_GROUP_COUNT = re.compile(r"feature_group_count=(\d+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_FREE = frozenset(  # no work of their own
    {
        "parameter",
        "constant",
        "get-tuple-element",
        "tuple",
        "bitcast",
        "while",
        "conditional",
        "call",
        "iota",
        "after-all",
        "partition-id",
        "replica-id",
        "copy-done",
        "async-done",
        "async-update",
        "add-dependency",
        "opt-barrier",
    }
)


@dataclasses.dataclass(frozen=True)
class Work:
    """flops: of products and kernels; hbm_bytes: read and written at every op of its own, arrays
    that the compiler keeps on the chip not counted."""

    flops: float = 0.0
    hbm_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.hbm_bytes + other.hbm_bytes,
        )


def work_by_part(program: Program, part: Callable[[str], str]) -> dict[str, Work]:
    """Part -> work of one device. part: from the scope under which an op was traced.

    Loops count as often as they run. A custom kernel counts what its author says it costs.
    """
    found: dict[str, Work] = {}
    for computation, one, times, fused in program.each():
        if not fused and one.opcode in _FREE:
            continue
        flops = _flops(program, computation, one)
        moved = 0.0 if fused else hbm_bytes(program, computation, one)
        if one.opcode == "custom-call" and (stated := _COST.search(one.rest)):
            flops += float(stated[1])
        if flops or moved:
            name = part(one.scope)
            more = Work(flops * times, moved * times)
            found[name] = found.get(name, Work()) + more
    return found


def hbm_bytes(program: Program, computation: str, one: Instruction) -> float:
    """Bytes that an op of its own reads from and writes to HBM.

    Of an operand that a fusion only slices the slice counts, and of a result that it only updates
    in place the update.
    """
    kind = one.opcode.removesuffix("-start")
    operands = program.operands(computation, one)
    if kind in COLLECTIVES:
        return float(sum(_in_hbm(o.arrays) for o in operands) + _in_hbm(one.arrays))
    if kind in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _in_hbm(one.arrays[:1])
    if kind == "dynamic-update-slice":
        return 2.0 * _in_hbm(operands[1].arrays)
    if kind == "copy":
        pair = one.arrays[:2] if one.opcode == "copy-start" else (*one.arrays, *operands[0].arrays)
        return float(_in_hbm(pair))
    if kind == "fusion" and (called := _CALLS.search(one.rest)):
        return _fusion_bytes(program, called[1], one, operands)
    return float(sum(_in_hbm(o.arrays) for o in operands) + _in_hbm(one.arrays))


_SLICES = ("dynamic-slice", "slice", "gather")


def _fusion_bytes(
    program: Program, called: str, one: Instruction, operands: tuple[Instruction, ...]
) -> float:
    total, updated = 0.0, 0
    for inner in program.computations.get(called, ()):
        if inner.opcode != "parameter" or int(inner.operands[0]) >= len(operands):
            continue
        whole = _in_hbm(operands[int(inner.operands[0])].arrays)
        if not whole:
            continue
        reads = _readers(program, called, inner)
        if reads and all(reader.opcode in _SLICES for _, reader in reads):
            total += min(sum(a.bytes for _, r in reads for a in r.arrays), whole)
        elif reads and all(_updates(reader) for _, reader in reads):
            for where, reader in reads:
                update = program.find(where, reader.operands[1])
                updated += sum(a.bytes for a in reader.arrays)
                total += sum(a.bytes for a in update.arrays) if update else 0
        else:
            total += whole
    return total + max(_in_hbm(one.arrays) - updated, 0)


def _readers(program: Program, where: str, one: Instruction) -> list[tuple[str, Instruction]]:
    """(computation, op) of what reads a value, through bitcasts and into fusions."""
    found: list[tuple[str, Instruction]] = []
    for user in program.computations[where]:
        if one.name not in user.operands:
            continue
        called = _CALLS.search(user.rest) if user.opcode == "fusion" else None
        if user.opcode == "bitcast":
            found += _readers(program, where, user)
        elif called:
            for inner in program.computations.get(called[1], ()):
                mine = inner.opcode == "parameter" and int(inner.operands[0]) < len(user.operands)
                if mine and user.operands[int(inner.operands[0])] == one.name:
                    found += _readers(program, called[1], inner)
        else:
            found.append((where, user))
    return found


def _updates(reader: Instruction) -> bool:
    """Whether an op only overwrites a part of the value."""
    return reader.opcode == "dynamic-update-slice" and reader.operands[0] != reader.operands[1]


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.space == 0)


def _flops(program: Program, computation: str, one: Instruction) -> float:
    if one.opcode == "dot":
        left = program.operands(computation, one)
        contracted = _CONTRACTED.search(one.rest)
        if not left or contracted is None:
            return 0.0
        dims = left[0].arrays[0].dims
        inner = math.prod(dims[int(i)] for i in contracted[1].split(",") if i)
        return 2.0 * one.arrays[0].size * inner
    if one.opcode == "convolution":
        return _convolution_flops(program, computation, one)
    return 0.0


def _convolution_flops(program: Program, computation: str, one: Instruction) -> float:
    """2 x multiply-adds on elements that exist; batched products are convolutions on TPUs."""
    operands, labels = program.operands(computation, one), _LABELS.search(one.rest)
    if len(operands) < 2 or labels is None:
        return 0.0
    x, kernel, y = operands[0].arrays[0].dims, operands[1].arrays[0].dims, one.arrays[0].dims
    window = (
        dict(re.findall(r"(\w+)=([\w\-x]+)", found[1]))
        if (found := _WINDOW.search(one.rest))
        else {}
    )
    spatial = sorted(label for label in labels[1] if label.isdigit())

    def field(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    taps = 1.0
    for index, label in enumerate(spatial):
        taps *= _taps(
            x[labels[1].index(label)],
            kernel[labels[2].index(label)],
            y[labels[3].index(label)],
            int(field("stride", "1")[index]),
            int(field("pad", "0_0")[index].split("_")[0]),
            int(field("lhs_dilate", "1")[index]),
            int(field("rhs_dilate", "1")[index]),
        )
    inner = kernel[labels[2].index("i")]  # of one feature group
    outer = y[labels[3].index("b")] * y[labels[3].index("f")]
    return 2.0 * taps * inner * outer


def _taps(size, width, out, stride, low, dilate, step) -> int:
    """Pairs of an output place and a kernel place that meet an element and no padding."""
    if width == 1 and dilate == 1 and low == 0:
        return out
    place = np.arange(out)[:, None] * stride - low + np.arange(width)[None, :] * step
    inside = (place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)
    return int(inside.sum())
