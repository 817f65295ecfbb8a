"""The TPU compiler's final schedule of one kernel: bundles, loops, guards, slots, cycles.

The compiler prints a program as VLIW bundles, one a cycle where nothing stalls (dump files
`*-final_bundles.txt`), and the slots each bundle fills (`*final_hlo-static-per-bundle-utilization.txt`).
Control flow is structured: a loop is a label LB and a backward branch, a guard is a forward branch
to a label PF; both branches have delay slots, which run whether the branch is taken or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +([A-Z]{2})? *: *([> ]*)\{", re.MULTILINE)
_BRANCH = re.compile(r"sbr\.rel \(!?%(p\w+)\) target = \$region(\d+)")
_EMPTY_REGION = re.compile(r"Start/End empty region (\d+)")
_START_REGION = re.compile(r"Start region (\d+)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_DMA = re.compile(r"= (dma\.(?!done)[a-z_]+).*?size_in_granules=\*/(\d+)", re.DOTALL)
_GRANULE = 32  # bytes


@dataclass(frozen=True)
class Region:
    """Bundles [start, stop) that run as often as each other, but for those of the children.

    path: "" for the whole kernel; "loop0", "loop0/if1", ... for the parts, numbered by address.
    trips: of a loop, if the schedule tells; of the body of Pallas's grid pipeline, relative to the
        loop around it: minus the two trips that only fill and drain the pipeline.
    """

    path: str
    start: int
    stop: int
    trips: int | None = None
    pipelined: bool = False
    children: tuple[Region, ...] = ()

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def is_loop(self) -> bool:
        """Whether this is a loop, not a guard or the whole."""
        return self.name.startswith("loop")

    def walk(self) -> Iterator[Region]:
        """This region and all below, in the order of their addresses."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Schedule:
    """All bundles of one kernel.

    slots: int [bundles, kinds], how many slots of each kind a bundle fills.
    kinds: names of the columns; capacity: how many slots of each kind there are.
    text: the bundles as the compiler prints them, one string a bundle.
    """

    root: Region
    slots: np.ndarray
    kinds: tuple[str, ...]
    capacity: tuple[int, ...]
    text: tuple[str, ...]

    @property
    def regions(self) -> dict[str, Region]:
        """Regions by path."""
        return {region.path: region for region in self.root.walk()}

    def own(self, region: Region) -> np.ndarray:
        """bool [bundles]: those of a region that belong to none of its children."""
        mask = np.zeros(len(self.text), bool)
        mask[region.start : region.stop] = True
        for child in region.children:
            mask[child.start : child.stop] = False
        return mask

    def executions(self, counts: Mapping[str, int] | None = None) -> dict[str, int]:
        """How often each region runs in one call of the kernel.

        counts: path -> executions in all, for loops and guards that depend on data. A loop not
            named takes its static trips, a guard not named runs whenever the region around it does.
        Raises ValueError for a path that does not exist and for a loop without known trips.
        """
        counts = dict(counts or {})
        unknown = counts.keys() - self.regions.keys()
        if unknown:
            raise ValueError(f"No regions {sorted(unknown)}; there are {sorted(self.regions)}.")
        result: dict[str, int] = {}

        def visit(region: Region, around: int, outer: int) -> None:
            if region.path in counts:
                times = counts[region.path]
            elif region.is_loop and region.trips is None:
                if around:
                    raise ValueError(
                        f"The trips of {region.path!r} depend on data: give counts[{region.path!r}]."
                    )
                times = 0
            elif region.is_loop:
                times = around * (region.trips or 0)
            else:
                times = around - 2 * outer if region.pipelined else around
            result[region.path] = times
            for child in region.children:
                visit(child, times, around)

        visit(self.root, 1, 0)
        return result

    def runs(self, counts: Mapping[str, int] | None = None) -> np.ndarray:
        """int [bundles]: how often each bundle runs in one call of the kernel."""
        executions = self.executions(counts)
        runs = np.zeros(len(self.text), np.int64)
        for region in self.root.walk():
            runs[self.own(region)] = executions[region.path]
        return runs

    def cycles(self, counts: Mapping[str, int] | None = None) -> int:
        """Bundles x executions: the kernel's cycles where no memory makes it wait."""
        return int(self.runs(counts).sum())

    def slot_use(self, counts: Mapping[str, int] | None = None) -> dict[str, int]:
        """Kind of slot -> slots filled in one call of the kernel."""
        return dict(zip(self.kinds, (self.runs(counts) @ self.slots).tolist(), strict=True))

    def spills(self, region: Region) -> int:
        """Vector spills and fills among the bundles of a region, children included."""
        columns = [k for k, kind in enumerate(self.kinds) if kind.endswith((":FILL", ":SPILL"))]
        return int(self.slots[region.start : region.stop, columns].sum())

    def dmas(self, region: Region) -> list[tuple[str, int]]:
        """Copies a region starts each time it runs, children left out: (kind, bytes)."""
        text = "".join(self.text[k] for k in np.flatnonzero(self.own(region)))
        return [(kind, int(size) * _GRANULE) for kind, size in _DMA.findall(text)]

    def hot(self) -> Region:
        """The innermost region that holds the most matrix-unit work (else the most bundles)."""
        column = self.kinds.index("MATMUL")

        def weight(region: Region) -> tuple[int, int]:
            own = self.own(region)
            return int(self.slots[own, column].sum()), int(own.sum())

        return max(self.root.walk(), key=weight)

    def table(self, counts: Mapping[str, int] | None = None) -> str:
        """A line per region: bundles of its own, executions, slots per bundle, spills."""
        try:
            executions: Mapping[str, int | str] = self.executions(counts)
        except ValueError:
            executions = {}
        shown = [kind for kind in self.kinds if not kind.endswith((":FILL", ":SPILL"))]
        lines = [
            f"{'region':28}{'at':>12}{'bundles':>9}{'runs':>9}"
            + "".join(f"{kind:>9}" for kind in shown)
            + f"{'spills':>8}"
        ]
        for region in self.root.walk():
            own = self.own(region)
            sums = self.slots[own].sum(0)
            trips = "?" if region.is_loop and region.trips is None else ""
            lines.append(
                f"{region.path or 'kernel':28}{f'{region.start:x}-{region.stop:x}':>12}"
                f"{int(own.sum()):>9}{executions.get(region.path, trips):>9}"
                + "".join(f"{int(sums[self.kinds.index(kind)]):>9}" for kind in shown)
                + f"{int(sum(sums[k] for k, kind in enumerate(self.kinds) if ':' in kind)):>8}"
            )
        return "\n".join(lines)


def parse(bundles: str, utilization: str, *, delay_slots: int) -> Schedule:
    """The schedule from the text of the two dump files.

    delay_slots: bundles after a branch that run in any case (4 to TPU v6e, 6 on tpu7x).
    Raises ValueError if the two files do not have the same number of bundles.
    """
    starts = list(_BUNDLE.finditer(bundles))
    ends = [match.start() for match in starts[1:]] + [len(bundles)]
    text = tuple(bundles[match.start() : end] for match, end in zip(starts, ends, strict=True))
    header, _, rows = utilization.partition("== UTILIZATION:")
    kinds, capacity = header.strip().splitlines()[1:3]
    slots = np.array([line.split() for line in rows.strip().splitlines()], np.int64)
    if len(slots) != len(text):
        raise ValueError(f"{len(text)} bundles, but utilization of {len(slots)}.")
    labels = [match.group(2) for match in starts]
    root = _nest(_spans(text, labels, delay_slots), text)
    return Schedule(
        root=root,
        slots=slots,
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        capacity=tuple(int(value) for value in capacity.split()),
        text=text,
    )


class _Span(NamedTuple):
    """A loop (from its label) or a guard (from behind its branch) and the predicate it branches on."""

    start: int
    stop: int
    opened: int
    kind: str
    predicate: str


def _spans(text: tuple[str, ...], labels: list, delay_slots: int) -> list[_Span]:
    loops: list[int] = []
    guards: list[tuple[str, _Span]] = []  # by target, not yet closed
    spans: list[_Span] = []
    started: set[str] = set()
    for address, bundle in enumerate(text):
        if labels[address] == "PF":
            named = set(_EMPTY_REGION.findall(bundle))
            closed = [guard for guard in guards if guard[0] in named] or guards[-1:]
            spans += [span._replace(stop=address) for _, span in closed]
            guards = [guard for guard in guards if guard not in closed]
        if labels[address] == "LB":
            loops.append(address)
            # A guard whose delay slots reach into a loop is the one that skips the loop.
            guards = [(to, span._replace(start=min(span.start, address))) for to, span in guards]
        started |= set(_START_REGION.findall(bundle))
        for predicate, target in _BRANCH.findall(bundle):
            stop = min(address + 1 + delay_slots, len(text))
            if target in started and loops:
                start = loops.pop()
                spans.append(_Span(start, stop, start, "loop", predicate))
            else:
                guards.append((target, _Span(stop, stop, address, "if", predicate)))
    return spans


def _nest(spans: list[_Span], text: tuple[str, ...]) -> Region:
    """The tree of spans, with what the scalar code tells about trips."""
    values = _definitions(text)
    rest = sorted(spans, key=lambda span: (span.start, span.opened))

    def children(path: str, stop: int) -> tuple[Region, ...]:
        found: list[Region] = []
        number = {"loop": 0, "if": 0}
        while rest and rest[0].start < stop:
            span = rest.pop(0)
            last = min(span.stop, stop)  # two spans may cross in a branch's delay slots
            if span.start >= last:
                continue
            name = f"{path}/{span.kind}{number[span.kind]}".lstrip("/")
            number[span.kind] += 1
            loop = span.kind == "loop"
            trips = _trips(span.predicate, values) if loop else None
            pipelined = not loop and _is_pipeline_body(span.predicate, values)
            below = children(name, last)
            found.append(Region(name, span.start, last, trips, pipelined, below))
        return tuple(found)

    return Region("", 0, len(text), children=children("", len(text)))


def _definitions(text: tuple[str, ...]) -> dict[str, str]:
    """Scalar or predicate name -> the instruction that makes it, comments removed."""
    pattern = re.compile(r"%([sp]\w+) = ([^;}]*)")
    values: dict[str, str] = {}
    for bundle in text:
        for name, instruction in pattern.findall(_COMMENT.sub("", bundle)):
            values.setdefault(name, instruction.strip())
    return values


_COMPARE = re.compile(r"scmp\.(\w+)\.s32\.totalorder (?:\(!?%\w+\), )?%(\w+), (-?\d+)$")


def _trips(predicate: str, values: Mapping[str, str]) -> int | None:
    """Trips of `do { i += step } while (!(i >= bound))`, where start, step and bound are constants."""
    compare = _COMPARE.match(values.get(predicate, ""))
    if not compare or compare[1] not in ("ge", "eq"):
        return None
    step = re.match(r"sadd\.s32 (-?\d+), %(\w+)", values.get(compare[2], ""))
    phi = re.match(r"sphi %(\w+), %(\w+)", values.get(step[2], "")) if step else None
    start = re.match(r"smov\.u32 (?:\(!?%\w+\), )?(\d+)$", values.get(phi[1], "")) if phi else None
    if not (step and phi and start) or phi[2] != compare[2]:
        return None
    return -(-(int(compare[3]) - int(start[1])) // int(step[1]))


def _is_pipeline_body(predicate: str, values: Mapping[str, str]) -> bool:
    """Whether a guard skips the first and the last trip of a loop: !(i >= 1 and i < steps + 1)."""
    both = re.match(r"pnand %(\w+), %(\w+)", values.get(predicate, ""))
    if not both:
        return False
    first, last = values.get(both[1], ""), values.get(both[2], "")
    low = re.match(r"scmp\.ge\.s32\.totalorder %(\w+), 1$", first)
    high = re.match(r"scmp\.lt\.s32\.totalorder %(\w+), ", last)
    return bool(low and high and low[1] == high[1])
