"""Loops and guards of a schedule, read from its labels, branches and scalar code.

A loop is a label LB and a branch back; a guard is a branch forward to a label PF, which names the
region it ends. The bundles in a branch's delay slots run whether it is taken or not, so that a
guard begins and a loop ends behind them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_BRANCH = re.compile(r"sbr\.rel \(!?%(p\w+)\) target = \$region(\d+)")
_EMPTY_REGION = re.compile(r"Start/End empty region (\d+)")
_START_REGION = re.compile(r"Start region (\d+)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Region:
    """Bundles [start, stop) that run equally often, but for those of the children.

    path: "" for the whole kernel, else like "loop0/if1", numbered by address in each region.
    trips: of a loop, where the schedule tells.
    pipelined: the body of the loop that Pallas makes of a grid: it runs in all trips but two, which
        fill and drain the pipeline.
    """

    path: str
    start: int
    stop: int
    trips: int | None = None
    pipelined: bool = False
    children: tuple[Region, ...] = ()

    @property
    def is_loop(self) -> bool:
        """Whether this is a loop, not a guard or the whole."""
        return self.path.rpartition("/")[2].startswith("loop")

    def walk(self) -> Iterator[Region]:
        """This region and all below, in the order of their addresses."""
        yield self
        for child in self.children:
            yield from child.walk()


class _Span(NamedTuple):
    start: int
    stop: int
    opened: int  # address of the label or of the branch
    kind: str
    predicate: str


def read_regions(text: Sequence[str], labels: Sequence[str | None], delay: int) -> Region:
    """The tree of regions. text, labels: of each bundle; delay: slots behind a branch."""
    values = _Values(text)
    rest = sorted(_spans(text, labels, delay), key=lambda span: (span.start, span.opened))

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
            trips = values.trips(span.predicate) if loop else None
            pipelined = not loop and values.skips_first_and_last(span.predicate)
            found.append(Region(name, span.start, last, trips, pipelined, children(name, last)))
        return tuple(found)

    return Region("", 0, len(text), children=children("", len(text)))


def _spans(text: Sequence[str], labels: Sequence[str | None], delay: int) -> list[_Span]:
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
            stop = min(address + 1 + delay, len(text))
            if target in started and loops:
                start = loops.pop()
                spans.append(_Span(start, stop, start, "loop", predicate))
            else:
                guards.append((target, _Span(stop, stop, address, "if", predicate)))
    return spans


class _Values:
    """What the scalar code computes: name -> instruction, copies and spills followed."""

    def __init__(self, text: Sequence[str]) -> None:
        self.instructions: dict[str, str] = {}
        self.spilled: dict[str, str] = {}
        for bundle in text:
            plain = _COMMENT.sub("", bundle)
            for name, instruction in re.findall(r"%([sp]\w+) = ([^;}]*)", plain):
                self.instructions.setdefault(name, instruction.strip())
            for slot, name in re.findall(r"sst \[smem:\[#(\w+_spill)\]\] %(s\w+)", plain):
                self.spilled[slot] = name

    def of(self, name: str) -> str:
        """The instruction that makes a value."""
        instruction = self.instructions.get(name, "")
        if spill := re.match(r"sld \[smem:\[#(\w+_spill)\]\]$", instruction):
            return self.of(self.spilled.get(spill[1], ""))
        if copy := re.match(r"smov\.u32 %(s\w+)$", instruction):
            return self.of(copy[1])
        # A predicate is spilled as a number.
        test = re.match(r"scmp\.ne\.s32\.totalorder %(s\w+), 0$", instruction)
        chosen = re.match(r"scalar_select +%(p\w+), +1, +0$", self.of(test[1])) if test else None
        return self.of(chosen[1]) if chosen else instruction

    def trips(self, predicate: str) -> int | None:
        """Trips of `do { i += step } while (!(i >= bound))` with constant start, step and bound."""
        end = re.match(r"scmp\.(?:ge|eq)\.s32\.totalorder %(s\w+), (\d+)$", self.of(predicate))
        step = re.match(r"sadd\.s32 (\d+), %(s\w+)$", self.of(end[1])) if end else None
        phi = re.match(r"sphi %(s\w+), %(s\w+)$", self.of(step[2])) if step else None
        start = re.match(r"smov\.u32 (?:\(!?%\w+\), )?(\d+)$", self.of(phi[1])) if phi else None
        if not (end and step and phi and start and self.of(phi[2]) == self.of(end[1])):
            return None
        return -(-(int(end[2]) - int(start[1])) // int(step[1]))

    def skips_first_and_last(self, predicate: str) -> bool:
        """Whether a guard's branch is taken unless 1 <= i < bound, for the same i."""
        both = re.match(r"pnand %(p\w+), %(p\w+)$", self.of(predicate))
        if not both:
            return False
        low = re.match(r"scmp\.ge\.s32\.totalorder %(s\w+), 1$", self.of(both[1]))
        high = re.match(r"scmp\.lt\.s32\.totalorder %(s\w+), ", self.of(both[2]))
        return bool(low and high and low[1] == high[1])
