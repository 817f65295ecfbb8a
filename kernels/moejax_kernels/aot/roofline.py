"""Least times of a program by part: what bounds each, were nothing else in its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from moejax_kernels.aot.program import parse_program
from moejax_kernels.aot.topology import Topology
from moejax_kernels.aot.traffic import Transfer, transfers
from moejax_kernels.aot.work import Work, work_by_part


@dataclasses.dataclass(frozen=True)
class Part:
    """Work of one device in one part of a program, and the seconds it takes at the least.

    links: bytes that leave the device. Times are modelled: flops at the peak rate, HBM bytes and
    link bytes at theirs, all links of a chip busy.
    """

    name: str
    work: Work
    links: float
    compute_seconds: float
    hbm_seconds: float
    link_seconds: float

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "HBM" or "links"."""
        times = {
            "compute": self.compute_seconds,
            "HBM": self.hbm_seconds,
            "links": self.link_seconds,
        }
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        """The longest of the three, which overlap at best."""
        return max(self.compute_seconds, self.hbm_seconds, self.link_seconds)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """parts: by time. transfers: every collective. unknown_loops: counted as one trip each."""

    parts: tuple[Part, ...]
    transfers: tuple[Transfer, ...]
    unknown_loops: tuple[str, ...]

    @property
    def total(self) -> Part:
        """The whole program, as if all its parts overlapped."""
        return _sum("whole step", self.parts)


def roofline(
    hlo: str,
    topology: Topology,
    mesh: Sequence[tuple[str, int]],
    part: Callable[[str], str],
) -> Roofline:
    """Reads an optimized program. mesh: (axis, size) outermost first; part: scope -> its name."""
    program = parse_program(hlo)
    sent = transfers(program, mesh)
    work = work_by_part(program, part)
    links: dict[str, float] = {}
    for one in sent:
        name = part(one.scope)
        links[name] = links.get(name, 0.0) + one.total
    parts = [
        _part(name, work.get(name, Work()), links.get(name, 0.0), topology)
        for name in {**work, **links}
    ]
    parts.sort(key=lambda one: -one.seconds)
    return Roofline(tuple(parts), sent, program.unknown_loops)


def _part(name: str, work: Work, links: float, topology: Topology) -> Part:
    return Part(
        name,
        work,
        links,
        work.flops / topology.peak,
        work.hbm_bytes / topology.hbm_rate,
        links / topology.link_rate,
    )


def _sum(name: str, parts: Sequence[Part]) -> Part:
    def over(field: str) -> float:
        return sum(getattr(part, field) for part in parts)

    return Part(
        name,
        sum((part.work for part in parts), Work()),
        over("links"),
        over("compute_seconds"),
        over("hbm_seconds"),
        over("link_seconds"),
    )
