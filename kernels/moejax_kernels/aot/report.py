"""What the compiler says about one program."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from moejax_kernels.aot import hlo
from moejax_kernels.aot.schedule import Schedule, parse
from moejax_kernels.chips import Chip


@dataclass(frozen=True)
class Report:
    """A compiled program.

    flops, hbm_bytes, optimal_seconds: the compiler's own estimates, nan for GPUs. It does not see
        into loops of unknown length, and counts for a kernel its author's `cost_estimate`.
    memory: bytes per device: arguments, outputs, aliased, temporaries.
    hlo: the optimized program; compiler: its version.
    dumps: name of an HLO op (fusion or kernel) -> text of its bundles and of their use.
    """

    chip: Chip
    flops: float
    hbm_bytes: float
    optimal_seconds: float
    memory: dict[str, int]
    compiler: str
    hlo: str = field(repr=False)
    dumps: dict[str, tuple[str, str]] = field(repr=False)

    @cached_property
    def kernels(self) -> dict[str, Schedule]:
        """Schedules by name of the HLO op."""
        return {name: parse(*texts, self.chip) for name, texts in self.dumps.items()}

    @cached_property
    def collectives(self) -> tuple[hlo.Collective, ...]:
        """Collective ops of the program."""
        return hlo.collectives(self.hlo)

    def kernel(self, name: str) -> Schedule:
        """The schedule of the op of that name; the compiler's suffix (".1") may be left out.

        Raises ValueError if there is none or more than one.
        """
        pattern = re.compile(rf"{re.escape(name)}(\.\d+)?")
        found = [key for key in self.dumps if pattern.fullmatch(key)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} ops are called {name!r} among {sorted(self.dumps)}.")
        return parse(*self.dumps[found[0]], self.chip)

    def table(self) -> str:
        """The report as text: costs, memory, collectives, the ops with most bundles."""
        lines = [
            f"{self.chip.name}, {self.compiler}, compiler's estimates:",
            f"flops {self.flops:.3e}, HBM bytes {self.hbm_bytes:.3e}, "
            f"optimal {1e6 * self.optimal_seconds:.1f} us",
            "memory per device: "
            + ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in self.memory.items()),
        ]
        if self.collectives:
            lines.append(hlo.table(self.collectives))
        largest = sorted(self.kernels.items(), key=lambda item: -len(item[1].text))[:12]
        if largest:
            lines.append(f"{'op':32}{'bundles':>9}{'cycles':>12}{'spills':>8}")
        for name, schedule in largest:
            try:
                cycles = f"{schedule.cycles():.0f}"
            except ValueError:
                cycles = "by data"
            spills = schedule.spills(schedule.root)
            lines.append(f"{name:32}{len(schedule.text):>9}{cycles:>12}{spills:>8}")
        return "\n".join(lines)


_FINAL = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_UTILIZATION = re.compile(r"\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization\.txt")


def read_report(place: Path, facts: dict, chip: Chip, compiler: str) -> Report:
    """A report from a child's folder."""
    files: dict[str, dict[str, str]] = {}
    for file in (place / "dump").iterdir():
        for kind, pattern in (("bundles", _FINAL), ("use", _UTILIZATION)):
            if match := pattern.fullmatch(file.name):
                files.setdefault(match[1], {})[kind] = file.read_text(errors="replace")
    dumps = {
        name: (texts["bundles"], texts["use"])
        for name, texts in files.items()
        if len(texts) == 2 and not name.startswith(("TLP", "<"))
    }
    cost = facts["cost"]

    def estimate(name: str) -> float:
        return math.nan if cost is None else cost.get(name, 0.0)

    return Report(
        chip=chip,
        flops=estimate("flops"),
        hbm_bytes=estimate("bytes accessed"),
        optimal_seconds=estimate("optimal_seconds"),
        memory=facts["memory"],
        compiler=compiler,
        hlo=(place / "program.hlo").read_text(),
        dumps=dumps,
    )
