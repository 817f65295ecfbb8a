"""The TPU compiler's final schedule of one kernel: bundles, loops, guards, slots, cycles.

The compiler prints a program as VLIW bundles, one a cycle where nothing stalls (dump files
`*-final_bundles.txt`), and the slots that each bundle fills
(`*-final_hlo-static-per-bundle-utilization.txt`). Control flow is structured: `control.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moejax_kernels.aot.control import Region, read_regions
from moejax_kernels.chips import Chip

_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +([A-Z]{2})? *: *[> ]*\{", re.MULTILINE)
_DMA = re.compile(r"= (dma\.(?!done)[a-z_]+).*?size_in_granules=\*/(\d+)", re.DOTALL)
_GRANULE = 32  # bytes
_MATMUL = re.compile(r"= vmatmul\.(\S+)")


@dataclass(frozen=True)
class Schedule:
    """All bundles of one kernel.

    slots: int [bundles, kinds], how many slots of each kind a bundle fills.
    kinds: names of the columns; capacity: how many slots of each kind there are.
    matmul: float [bundles], cycles all matrix units together take for the rows a bundle feeds them.
    text: the bundles as the compiler prints them, one string a bundle.
    """

    chip: Chip
    root: Region
    slots: np.ndarray
    kinds: tuple[str, ...]
    capacity: tuple[int, ...]
    matmul: np.ndarray
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
        """Path -> how often each region runs in one call of the kernel.

        counts: path -> executions in all, for loops and guards that depend on data. A loop not
            named takes its constant trips, a guard not named runs whenever the region around it
            does.
        Raises ValueError for a path that does not exist and for a loop of unknown trips.
        """
        counts = dict(counts or {})
        unknown = counts.keys() - self.regions.keys()
        if unknown:
            raise ValueError(f"No regions {sorted(unknown)}; there are {sorted(self.regions)}.")
        result: dict[str, int] = {}

        def visit(region: Region, around: int, outer: int) -> None:
            times = around
            if region.path in counts:
                times = counts[region.path]
            elif region.is_loop and region.trips is not None:
                times = around * region.trips
            elif region.is_loop and around:
                raise ValueError(f"Trips of {region.path!r} depend on data: put them into counts.")
            elif region.pipelined:
                times = around - 2 * outer
            result[region.path] = times
            for child in region.children:
                visit(child, times, around)

        visit(self.root, 1, 0)
        return result

    def grid(self, steps: int) -> dict[str, int]:
        """Counts of the loop that Pallas makes of a grid, for a grid of so many steps.

        Raises ValueError if there is not one such loop.
        """
        loops = [
            region.path
            for region in self.root.walk()
            if region.is_loop and any(child.pipelined for child in region.children)
        ]
        if len(loops) != 1:
            raise ValueError(f"{len(loops)} loops look like a Pallas grid: {loops}.")
        return {loops[0]: steps + 2}

    def runs(self, counts: Mapping[str, int] | None = None) -> np.ndarray:
        """int [bundles]: how often each bundle runs in one call of the kernel."""
        executions = self.executions(counts)
        runs = np.zeros(len(self.text), np.int64)
        for region in self.root.walk():
            runs[self.own(region)] = executions[region.path]
        return runs

    def bundles(self, counts: Mapping[str, int] | None = None) -> int:
        """Bundles x executions."""
        return int(self.runs(counts).sum())

    def cycles(self, counts: Mapping[str, int] | None = None) -> float:
        """Cycles of one call where no memory makes it wait.

        Per region the larger of its bundles and of the cycles its rows take in the matrix units:
        the compiler may issue rows faster than the units' published rate, which then stall it.
        """
        executions = self.executions(counts)
        return sum(times * self.once(self.regions[path]) for path, times in executions.items())

    def once(self, region: Region) -> float:
        """Cycles of a region's own bundles, run once."""
        own = self.own(region)
        return max(float(own.sum()), float(self.matmul[own].sum()))

    def slot_use(self, counts: Mapping[str, int] | None = None) -> dict[str, int]:
        """Kind of slot -> slots filled in one call of the kernel."""
        return dict(zip(self.kinds, (self.runs(counts) @ self.slots).tolist(), strict=True))

    def spills(self, region: Region) -> int:
        """Vector spills and fills among the bundles of a region, children included."""
        columns = [k for k, kind in enumerate(self.kinds) if kind.endswith((":FILL", ":SPILL"))]
        return int(self.slots[region.start : region.stop, columns].sum())

    def dmas(self, region: Region) -> list[tuple[str, int]]:
        """Copies that a region may start each time it runs, children left out: (kind, bytes)."""
        text = "".join(self.text[k] for k in np.flatnonzero(self.own(region)))
        return [(kind, int(size) * _GRANULE) for kind, size in _DMA.findall(text)]

    def hot(self) -> Region:
        """The innermost region with the most matrix-unit work (or else the most bundles)."""

        def weight(region: Region) -> tuple[float, int]:
            own = self.own(region)
            return float(self.matmul[own].sum()), int(own.sum())

        return max(self.root.walk(), key=weight)

    def table(self, counts: Mapping[str, int] | None = None) -> str:
        """A line per region: address, executions, own bundles, matrix-unit cycles, slots."""
        try:
            executions: Mapping[str, int | str] = self.executions(counts)
        except ValueError:
            executions = {
                path: "?" if region.is_loop and region.trips is None else ""
                for path, region in self.regions.items()
            }
        shown = [k for k, kind in enumerate(self.kinds) if ":" not in kind]
        hidden = [k for k, kind in enumerate(self.kinds) if ":" in kind]
        width = max(len(path) for path in self.regions) + 2
        head = f"{'region':{width}}{'at':>10}{'runs':>9}{'bundles':>9}{'matmul':>8}"
        lines = [head + "".join(f"{self.kinds[k]:>8}" for k in shown) + f"{'spills':>8}"]
        for path, region in self.regions.items():
            own = self.own(region)
            sums = self.slots[own].sum(0)
            lines.append(
                f"{path or 'kernel':{width}}{f'{region.start:x}-{region.stop:x}':>10}"
                f"{executions[path]:>9}{int(own.sum()):>9}{self.matmul[own].sum():>8.0f}"
                + "".join(f"{sums[k]:>8}" for k in shown)
                + f"{sums[hidden].sum():>8}"
            )
        return "\n".join(lines)


def parse(bundles: str, utilization: str, chip: Chip) -> Schedule:
    """The schedule from the text of the two dump files.

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
    return Schedule(
        chip=chip,
        root=read_regions(text, [match[2] for match in starts], chip.branch_delay),
        slots=slots,
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        capacity=tuple(int(value) for value in capacity.split()),
        matmul=np.array([_matmul_cycles(bundle, chip) for bundle in text]),
        text=text,
    )


def _matmul_cycles(bundle: str, chip: Chip) -> float:
    """A matmul instruction feeds one matrix unit a register of rows: 8 of float32, 16 of bfloat16.

    Of 8-bit numbers there are 32 to a register, at twice the rate.
    """
    registers = sum(8 if "f32" in kind.split(".") else 16 for kind in _MATMUL.findall(bundle))
    return registers / (chip.rows * chip.matrix_units)
