"""Cycles that must not grow: `python -m experiments.benchmarks.guard --record` writes the table.

Every op's cases at small shapes (a decode and a prefill of eight experts), on every chip they
compile for, and megablox, whose kernel stands still, so that it tells a new compiler or a changed
reading of schedules from a slower kernel. The table is per compiler version.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from moejax_kernels import aot
from moejax_kernels.chips import CHIPS
from moejax_kernels.shapes import Experts

from experiments.benchmarks import megablox
from experiments.benchmarks.tpu import SKEWS, ours

TABLE = Path(__file__).parents[2] / "tests" / "kernels" / "cycles.json"
GROWTH = 1.10
_SMALL = Experts("small", 1024, 512, 8, 2)
SHAPES = (_SMALL.gate(8), _SMALL.gate(1024))

Cycles = dict[str, float]


def measure(chip: str) -> Cycles:
    """Case at group sizes -> cycles on one chip. Raises CompileError if a case does not compile."""
    found: Cycles = {}
    for shape in SHAPES:
        cases = [*ours(shape, CHIPS[chip])]
        if shape.tokens >= 128:
            cases.append(megablox.case(shape, (128, 512, 512)))
        sizes = {label: shape.group_sizes(skew) for label, skew in SKEWS.items()}
        labels = list(sizes) * len(cases)
        for label, one in zip(labels, aot.price(cases, CHIPS[chip], sizes), strict=True):
            if one.cost is None:
                raise aot.CompileError(f"{one.case.name}, {shape.name}, {chip}: {one.failure}")
            found[f"{shape.name}, {label}, {one.case.name}"] = one.cost.cycles
    return found


def recorded(chip: str, compiler: str) -> Cycles | None:
    """What was recorded for a chip and a compiler version, None where nothing was."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return table.get(compiler, {}).get(chip)


def grown(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, str]:
    """Cases that take more cycles than allowed, or that nobody recorded -> what is wrong."""
    wrong = {}
    for name, cycles in now.items():
        if name not in before:
            wrong[name] = "is not recorded"
        elif cycles > GROWTH * before[name]:
            wrong[name] = f"takes {cycles:.0f} cycles, {cycles / before[name]:.2f} x the recorded"
    return wrong


def main() -> None:
    """Prints what differs from the table; with --record writes the table for this compiler."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--chips", nargs="+", choices=sorted(CHIPS), default=sorted(CHIPS))
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    compiler = aot.compiler_version()
    for chip in options.chips:
        now = measure(chip)
        before = recorded(chip, compiler) or {}
        for name, cycles in now.items():
            was = f"{before[name]:12.0f}" if name in before else f"{'new':>12}"
            print(f"{chip:8}{name:60}{was}{cycles:12.0f}", flush=True)
        table.setdefault(compiler, {})[chip] = now
        if options.record:
            TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
