"""What the compiler says about one program."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moejax_kernels.aot.schedule import Schedule, parse
from moejax_kernels.chips import Chip


@dataclass(frozen=True)
class Report:
    """A compiled program.

    flops, hbm_bytes, optimal_seconds: the compiler's own estimates. It does not see into loops of
        unknown length, and counts for a kernel what its author put into `cost_estimate`.
    memory: bytes per device: arguments, outputs, aliased, temporaries.
    hlo: the optimized program; compiler: its version.
    kernels: name of an HLO op (fusion or kernel) -> its schedule.
    """

    chip: Chip
    flops: float
    hbm_bytes: float
    optimal_seconds: float
    memory: dict[str, int]
    compiler: str
    hlo: str
    dumps: dict[str, tuple[str, str]]

    @cached_property
    def kernels(self) -> dict[str, Schedule]:
        """Schedules by name of the HLO op."""
        delay = self.chip.branch_delay
        return {name: parse(*texts, delay_slots=delay) for name, texts in self.dumps.items()}

    def kernel(self, name: str) -> Schedule:
        """The schedule of the one op of that name (a suffix ".1" of the compiler may be left out)."""
        found = [key for key in self.dumps if key == name or re.fullmatch(rf"{name}(\.\d+)?", key)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} kernels are called {name!r} of {sorted(self.dumps)}.")
        return parse(*self.dumps[found[0]], delay_slots=self.chip.branch_delay)


_FINAL = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_UTILIZATION = re.compile(r"\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization\.txt")


def read_report(place: Path, facts: dict, chip: Chip) -> Report:
    """A report from a child's folder."""
    files: dict[str, dict[str, str]] = {}
    for file in (place / "dump").iterdir():
        for kind, pattern in (("bundles", _FINAL), ("use", _UTILIZATION)):
            if match := pattern.fullmatch(file.name):
                files.setdefault(match[1], {})[kind] = file.read_text()
    dumps = {
        name: (texts["bundles"], texts["use"])
        for name, texts in files.items()
        if len(texts) == 2 and not name.startswith(("TLP", "<"))
    }
    return Report(
        chip=chip,
        flops=facts["cost"].get("flops", 0.0),
        hbm_bytes=facts["cost"].get("bytes accessed", 0.0),
        optimal_seconds=facts["cost"].get("optimal_seconds", 0.0),
        memory=facts["memory"],
        compiler=facts["compiler"],
        hlo=(place / "program.hlo").read_text(),
        dumps=dumps,
    )
