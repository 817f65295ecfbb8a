"""What steps take on a pod: tables as text and Markdown, a figure; all from compile.json."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moejax.core.atomic import read_json, write_atomically
from moejax.report.figures import COLOURS, drawing

Rows = list[tuple[str, ...]]


def pod_text(facts: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    console = Console(file=io.StringIO(), width=120)
    console.print(_title(facts), highlight=False)
    for name, step in facts["steps"].items():
        console.print(f"\n{name}: {_verdict(step, facts)}", highlight=False)
        for line in step["advice"]:
            console.print(f"  - {line}", highlight=False)
        for caption, columns, rows in _tables(step, facts):
            table = Table(title=caption, title_justify="left", box=None, pad_edge=False)
            for number, column in enumerate(columns):
                table.add_column(column, justify="right" if number else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table, highlight=False)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def pod_markdown(facts: Mapping[str, Any], heading: str = "#") -> str:
    """The tables for a page."""
    lines = [f"{heading} {_title(facts)}", ""]
    for name, step in facts["steps"].items():
        lines += [f"{heading}# {name}: {_verdict(step, facts)}", ""]
        lines += [f"- {line}" for line in step["advice"]]
        for caption, columns, rows in _tables(step, facts):
            lines += [caption, "", "| " + " | ".join(columns) + " |"]
            lines.append("|" + "|".join(["---", *["---:"] * (len(columns) - 1)]) + "|")
            lines += ["| " + " | ".join(row) + " |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def draw_pod(path: Path) -> None:
    """Writes report.md and plots/steps.png beside a compile.json."""
    facts = read_json(path)
    write_atomically(path.parent / "report.md", pod_markdown(facts))
    with drawing(path.parent / "plots" / "steps.png", 9, 3.6, ncols=2) as (_, (left, right)):
        _draw_memory(left, facts)
        _draw_parts(right, facts)


def _title(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['topology']}, {facts['devices']} devices: {facts['mesh']}; {facts['strategy']}; "
        f"{facts['compiler']}"
    )


def _verdict(step: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    used, hbm = step["memory"]["used"], facts["hbm"]
    fits = "fits" if step["fits"] else "does not fit"
    return f"{fits}, {used / 1e9:.1f} of {hbm / 1e9:.0f} GB, {step['tokens']:,} tokens a step"


def _tables(step: Mapping[str, Any], facts: Mapping[str, Any]):
    yield "Memory of one device", ("", "GB"), _memory(step, facts)
    if step["parts"]:
        columns = ("part", "Gflop", "HBM GB", "links GB", "compute ms", "HBM ms", "links ms")
        caption = "Least time by part, modelled: peak rates, all links busy"
        yield caption, (*columns, "bound by"), _parts(step)
        yield "The compiler's own estimate", ("each loop once", "value"), _estimate(step)
    if step["collectives"]:
        columns = ("collective", "axes", "runs", "MB out of a device")
        yield "Collectives of one step", columns, _collectives(step)


def _memory(step: Mapping[str, Any], facts: Mapping[str, Any]) -> Rows:
    memory, held = step["memory"], step["held"]
    rows = [(name, size) for name, size in held.items()]
    rows += [(name, memory[name]) for name in ("temporaries",) if name in memory]
    rows += [("at the worst moment", memory["used"]), ("the device has", facts["hbm"])]
    return [(name, f"{size / 1e9:.2f}") for name, size in rows]


def _parts(step: Mapping[str, Any]) -> Rows:
    return [
        (
            part["name"],
            f"{part['flops'] / 1e9:,.1f}",
            f"{part['hbm_bytes'] / 1e9:,.2f}",
            f"{part['links'] / 1e9:,.3f}",
            f"{1e3 * part['compute_seconds']:,.2f}",
            f"{1e3 * part['hbm_seconds']:,.2f}",
            f"{1e3 * part['link_seconds']:,.2f}",
            part["bound"],
        )
        for part in step["parts"]
    ]


def _estimate(step: Mapping[str, Any]) -> Rows:
    found = step["compiler_one_trip"]
    return [
        ("Gflop", f"{found['flops'] / 1e9:,.1f}"),
        ("HBM GB", f"{found['hbm_bytes'] / 1e9:,.2f}"),
        ("ms", f"{1e3 * found['seconds']:,.2f}"),
    ]


def _collectives(step: Mapping[str, Any]) -> Rows:
    return [
        (one["kind"], one["axes"] or "all", f"{one['runs']:,.0f}", f"{one['bytes'] / 1e6:,.2f}")
        for one in step["collectives"]
    ]


def _draw_memory(axes: Any, facts: Mapping[str, Any]) -> None:
    for row, step in enumerate(facts["steps"].values()):
        left = 0.0
        rest = max(step["memory"]["used"] - sum(step["held"].values()), 0)
        for number, (name, size) in enumerate({**step["held"], "while it runs": rest}.items()):
            label = name if row == 0 or name not in axes.get_legend_handles_labels()[1] else None
            axes.barh(row, size / 1e9, left=left, color=COLOURS[_colour(name, number)], label=label)
            left += size / 1e9
    axes.axvline(facts["hbm"] / 1e9, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(facts["steps"])), list(facts["steps"]))
    axes.set_xlabel("GB of one device; dashed: what it has")
    axes.set_title("Memory")
    axes.legend(loc="best")


def _colour(name: str, number: int) -> int:
    order = ("parameters", "optimizer", "sequence state", "while it runs")
    return order.index(name) if name in order else number


def _draw_parts(axes: Any, facts: Mapping[str, Any]) -> None:
    name, step = next(iter(facts["steps"].items()))
    parts = step["parts"][:-1]
    kinds = ("compute_seconds", "hbm_seconds", "link_seconds")
    for number, kind in enumerate(kinds):
        places = [row + 0.27 * (number - 1) for row in range(len(parts))]
        label = kind.removesuffix("_seconds")
        axes.barh(places, [1e3 * p[kind] for p in parts], 0.25, color=COLOURS[number], label=label)
    axes.set_yticks(range(len(parts)), [part["name"] for part in parts])
    axes.invert_yaxis()
    axes.set_xlabel("ms at the least (modelled)")
    axes.set_title(f"{name}, by part")
    axes.legend(loc="lower right")
