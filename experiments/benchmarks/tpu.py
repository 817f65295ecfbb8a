"""TPU kernels without a TPU: cycles of the compiler's schedules, HBM cycles, modelled time.

Modelled time is max(cycles, HBM bytes / bandwidth), simulated, for stated group sizes: balanced is
a router's uniform draw, skewed its draw with Zipf popularity (moejax_kernels/shapes.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from moejax_kernels import aot
from moejax_kernels.chips import CHIPS, Chip
from moejax_kernels.shapes import MIXTRAL, OLMOE, SHAPES, ZIPF, Shape

from experiments.benchmarks import peers

OPS = ("grouped_matmul", "gated_grouped_matmul", "quantized_grouped_matmul")
SKEWS = {"balanced": 0.0, "skewed": ZIPF}
HEADLINE = tuple(
    product for model in (OLMOE, MIXTRAL) for tokens in (8, 32, 4096)
    for product in (model.gate(tokens), model.down(tokens))
)  # fmt: skip
PICTURED = (OLMOE.gate(4096), OLMOE.gate(32), MIXTRAL.gate(32))  # whose schedules are drawn
DRAWN = ("ours bf16", "ours int4 g128", "ours int3 g128")  # of ours; and of each peer the best
_PREFILL = 512  # tokens from which on peers without a decode path are worth a look


def ours(shape: Shape, chip: Chip) -> Iterator[aot.Case]:
    """What every op's `cases.py` has for a shape."""
    for op in OPS:
        yield from import_module(f"moejax_kernels.{op}.cases").tpu(shape, chip)


def rows_of(
    shapes: Sequence[Shape], chips: Sequence[str], tilings: int, pictures: Path | None
) -> Iterator[dict[str, Any]]:
    """One row per shape, chip, kind of group sizes and contender.

    tilings: of megablox to compile; with none no peer is asked. pictures: folder for plots.
    """
    for chip in (CHIPS[name] for name in chips):
        for shape in shapes:
            sizes = {label: shape.group_sizes(skew) for label, skew in SKEWS.items()}
            cases = [*ours(shape, chip), *peers.kernels(shape, chip, sizes["balanced"], tilings)]
            priced = aot.price(cases, chip, sizes)
            labels = list(sizes) * len(cases)
            for label, one in zip(labels, priced, strict=True):
                yield _row(one, label, chip)
            if shape.tokens >= _PREFILL and tilings:
                yield from _whole_programs(shape, chip)
            if pictures is not None and shape in PICTURED:
                balanced = [one for one in priced if one.sizes is sizes["balanced"] and one.cost]
                _draw(balanced, chip, pictures)


def _row(one: aot.Priced, label: str, chip: Chip) -> dict[str, Any]:
    row = {
        "chip": chip.name,
        "shape": one.case.shape.name,
        "sizes": label,
        "contender": one.case.name,
        "visited": int(np.count_nonzero(one.sizes)),
        "bound": round(one.bound, 1),
    }
    if one.cost is None:
        return row | {"failure": one.failure.splitlines()[0][:200]}
    return row | {
        "cycles": round(one.cost.cycles, 1),
        "bundles": one.cost.bundles,
        "hbm_cycles": round(one.cost.hbm_cycles, 1),
        "modelled": round(one.cost.modelled, 1),
        "microseconds": round(1e6 * one.cost.seconds, 2),
        "useful": round(one.cost.useful_share, 4),
        "over_bound": round(one.over_bound, 4),
        "spills": one.cost.spills,
    }


def _whole_programs(shape: Shape, chip: Chip) -> Iterator[dict[str, Any]]:
    reports = aot.compile_all(peers.programs(shape), chip=chip, schedules=False, keep_failures=True)
    for name, report in reports.items():
        row = {"chip": chip.name, "shape": shape.name, "sizes": "any", "contender": name}
        if isinstance(report, aot.CompileError):
            yield row | {"failure": str(report).splitlines()[0][:200]}
        else:
            yield row | {
                "estimate_microseconds": round(1e6 * report.optimal_seconds, 1),
                "flops_over_useful": round(report.flops / shape.flops, 2),
            }


def _draw(priced: Iterable[aot.Priced], chip: Chip, pictures: Path) -> None:
    """The schedules of some of ours and of each peer's best."""
    best: dict[str, aot.Priced] = {}
    for one in sorted(priced, key=lambda one: -one.cost.modelled if one.cost else 0):
        ours = one.case.name.startswith("ours")
        if not ours or one.case.name in DRAWN:
            best[one.case.name if ours else one.case.name.split()[0]] = one
    for name, one in best.items():
        assert one.schedule is not None
        counts = one.case.counts(one.schedule, one.sizes)
        stem = f"{chip.name}-{one.case.shape.name}-{name}".replace("/", "-").replace(" ", "-")
        title = f"{one.case.name}, {one.case.shape.name}, {chip.name}"
        aot.plot(one.schedule, pictures / f"{stem}.png", counts, title)
        table = one.schedule.table(counts)
        (pictures / f"{stem}.txt").write_text(f"{title}\n{table}\n")


def named(names: Sequence[str]) -> tuple[Shape, ...]:
    """Shapes by name ("olmoe/8/gate"), by model or by model and tokens ("olmoe/8").

    Raises ValueError for a name that is none.
    """
    found = [s for s in SHAPES if any(s.name == n or s.name.startswith(f"{n}/") for n in names)]
    for name in names:
        if not any(s.name == name or s.name.startswith(f"{name}/") for s in found):
            raise ValueError(f"{name!r} is no shape; there are {[s.name for s in SHAPES]}.")
    return tuple(found)
