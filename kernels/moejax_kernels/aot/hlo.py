"""Collectives of an optimized HLO program, read from its text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_LONGEST_FIRST = "|".join(sorted(COLLECTIVES, reverse=True))
_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?(\S+) = (.*?) ({_LONGEST_FIRST})(-start)?\((.*)$",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\d\w*)?)\[([\d,]*)\]")
GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\]\s*\{.*?\})"
)


class Collective(NamedTuple):
    """One collective op; in the body of a loop it runs more than once.

    kind: "all-gather", "all-to-all", ...; bytes: of its result, per device.
    groups: the devices that talk to each other, as HLO writes them.
    """

    name: str
    kind: str
    bytes: int
    groups: str


def collectives(hlo: str) -> tuple[Collective, ...]:
    """All collectives of a program; of an asynchronous pair the start."""
    found = []
    for name, shape, kind, start, rest in _LINE.findall(hlo):
        arrays = _ARRAY.findall(shape)
        if start and kind != "all-reduce":
            # A start gives operands, results and scalars of its own; an all-reduce's the results.
            arrays = [array for array in arrays if array[1]]
            arrays = arrays[len(arrays) // 2 :]
        groups = GROUPS.search(rest)
        size = sum(_size(dtype, dims) for dtype, dims in arrays)
        found.append(Collective(name, kind, size, groups[1] if groups else ""))
    return tuple(found)


def table(found: Iterable[Collective]) -> str:
    """Count and bytes per device of each kind and grouping."""
    sums: dict[tuple[str, str], list[int]] = {}
    for collective in found:
        entry = sums.setdefault((collective.kind, collective.groups), [0, 0])
        entry[0] += 1
        entry[1] += collective.bytes
    lines = [f"{'collective':22}{'count':>6}{'MB':>10}  groups"]
    for (kind, groups), (count, size) in sorted(sums.items()):
        short = groups if len(groups) < 60 else groups[:57] + "..."
        lines.append(f"{kind:22}{count:>6}{size / 1e6:>10.3f}  {short}")
    return "\n".join(lines)


def _size(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    count = 1
    for size in filter(None, dims.split(",")):
        count *= int(size)
    return -(-count * bits // 8)
