"""docs/benchmarks.md from the JSON of the last runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks import bars, results, tpu

_INTRO = """# Benchmarks

Written by `python -m experiments.benchmarks page` from docs/benchmarks/*.json; every table names
the command that filled it. Shapes, and how group sizes are drawn: `moejax_kernels/shapes.py`.
"""
_TPU = """## TPU, without a TPU

**Simulated.** The real TPU compiler compiles each kernel; cycles are the bundles of its final
schedule times how often they run for the stated group sizes, with the matrix units held to their
published rate. Modelled time is max(cycles, HBM bytes / bandwidth): waits for memory inside a
kernel do not show. `bound` is the time of the bytes that any kernel for these operands must move.
megablox and tokamax: their best tiling of those compiled. Spills are of the inner loop. `× bf16`:
modelled time over that of our bfloat16 kernel at the same shape.

Activations: `a8`, `a16` and `a24` round every row of x to integers with one step per row, its
maximum / 127, / 32639 or / 8355711. An element is off by half a step at most; at 24 bits that is
less than sums in float32 lose.

Packed experts at prefill are decoded once per group, in VMEM, and multiplied as bfloat16 (`dx`: the
gradient of x, likewise). Their rows include what it costs to put x into the order of the planes:
one pass of x through HBM. They save memory and, where the bank is large beside x, bytes; decoding
is not hidden behind products.
"""
_SPARSE = """## N:M sparsity: not built

2:4 in bfloat16 stores half the values and two bits of index for each: 9 of 16 bits a weight, what
int8 with scales per 128 inputs (8.1 bits) undercuts without pruning. With int4 values it is 3 bits
and scales, what packed 3 bits take. No bytes are saved over formats that exist, and bytes are what
decode waits for. TPUs have no sparse matrix unit, so values must be put back into dense operands:
for each of four places a comparison and a selection of two candidates, where taking 3-bit codes
apart already fills 83 % of v6e's vector slots (schedule above). At prefill the dense product is all
that counts. Sparse tensor cores of GPUs could pay there; nothing of that can be priced without a
card.
"""
_CPU = """## CPU

Measured: one process, contenders in turn, median of the ratios within a turn. A layer's experts
(gate, up, activation, down, weighted sum) from given routes, random weights.
"""


def write(folder: Path, page: Path) -> None:
    """Writes the page from tpu.json and cpu.json, those that exist; reasons.json explains bars."""
    reasons = _read(folder / "reasons.json") or {}
    parts = [_INTRO]
    if on_tpu := results.load(folder / "tpu.json"):
        rows = results.rows_of(on_tpu)
        parts += [_TPU, _facts(on_tpu), bars.table(bars.TPU_BARS, rows, reasons), _missing(rows)]
        parts += [_tpu_tables(rows), _whole(rows), _pictures(folder, page)]
    parts.append(_SPARSE)
    if on_cpu := results.load(folder / "cpu.json"):
        rows = results.rows_of(on_cpu)
        parts += [_CPU, _facts(on_cpu), bars.table(bars.CPU_BARS, rows, reasons)]
        parts += [_cpu_table(rows)]
    page.write_text("\n\n".join(part.strip() for part in parts if part) + "\n")


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _missing(rows: Iterable[Mapping[str, Any]]) -> str:
    """Headline shapes without a row, which the bars above therefore say nothing of."""
    seen = {(row["chip"], row["shape"]) for row in rows}
    names = [(chip, shape.name) for chip in bars.TPUS for shape in tpu.HEADLINE]
    left = [f"{chip} {name}" for chip, name in names if (chip, name) not in seen]
    return f"Not measured yet: {', '.join(left)}." if left else ""


def _facts(runs: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        where = f" on {run['machine']}" if "machine" in run else ""
        missing = "".join(f" {name} was not installed." for name in run.get("missing", ()))
        lines.append(f"- `{run['command']}` at {run['commit']}{where}; {versions}.{missing}")
    return "\n".join(lines)


def best(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows with a cost; of a contender with many tilings the fastest."""
    found: dict[tuple, Mapping[str, Any]] = {}
    for row in rows:
        if "modelled" not in row:
            continue
        name = str(row["contender"])
        tiled = name.startswith(("megablox", "tokamax"))
        key = (row["chip"], row["shape"], row["sizes"], name.split()[0] if tiled else name)
        if key not in found or row["modelled"] < found[key]["modelled"]:
            found[key] = row
    return list(found.values())


def _tpu_tables(rows: Iterable[Mapping[str, Any]]) -> str:
    head = (
        "| chip | shape | group sizes | contender | cycles | HBM cycles | modelled µs | × bound "
        "| × bf16 | useful | spills |\n|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|"
    )
    lines = [head]
    found = best(rows)
    plain = {_place(row): row for row in found if row["contender"] == "ours bf16"}
    for row in found:
        base = plain.get(_place(row))
        over = f"{row['modelled'] / base['modelled']:.2f}" if base else ""
        lines.append(
            f"| {row['chip']} | {row['shape']} | {row['sizes']} | {row['contender']} "
            f"| {row['cycles']:,.0f} | {row['hbm_cycles']:,.0f} | {row['microseconds']:,.1f} "
            f"| {row['over_bound']:.2f} | {over} | {row['useful']:.0%} | {row['spills']} |"
        )
    return "\n".join(lines)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["chip"], row["shape"], row["sizes"]


def _whole(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "What XLA makes of a grouped matmul, by the compiler's own estimate, for the worst "
        "group sizes (a loop of unknown length is not priced):\n",
        "| chip | shape | contender | estimate µs | flops / useful |\n|---|---|---|--:|--:|",
    ]
    for row in rows:
        if "estimate_microseconds" in row:
            lines.append(
                f"| {row['chip']} | {row['shape']} | {row['contender']} "
                f"| {row['estimate_microseconds']:,.1f} | {row['flops_over_useful']:.1f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _pictures(folder: Path, page: Path) -> str:
    parts = ["### Schedules\n\nSlots filled per bundle, and regions with executions of one call."]
    for picture in sorted(folder.glob("*.png")):
        where = picture.relative_to(page.parent)
        parts.append(f"![{picture.stem}]({where})")
        excerpt = picture.with_suffix(".txt")
        if excerpt.exists():
            parts.append(f"```\n{excerpt.read_text().strip()}\n```")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _cpu_table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| case | shape | group sizes | contender | ms | over | ratio | compile s |\n"
        "|---|---|---|---|--:|---|--:|--:|"
    ]
    for row in rows:
        compiled = f"{row['compile_seconds']:.1f}" if row.get("compile_seconds") else ""
        lines.append(
            f"| {row['case']} | {row['shape']} | {row['sizes']} | {row['contender']} "
            f"| {row['milliseconds']:.2f} | {row['over']} | {row['ratio']:.3f} | {compiled} |"
        )
    return "\n".join(lines)
