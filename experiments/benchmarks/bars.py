"""The bars of the kernels as data: what is measured, the bound, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Measured = dict[str, float]


class Bar(NamedTuple):
    """A bound on a figure. measure: rows of the tables -> figure by what it is of.

    below: whether figures must stay at or below the bound, else at or above it.
    ideal: the same figure for a kernel that takes no longer than HBM needs for its least bytes.
    """

    name: str
    bound: float
    below: bool
    measure: Callable[[Iterable[Row]], Measured]
    ideal: Callable[[Iterable[Row]], Measured] | None = None

    def met(self, figure: float) -> bool:
        """Whether one figure keeps the bound."""
        return figure <= self.bound if self.below else figure >= self.bound


TPUS = ("v5e", "v6e")


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with a cost that have these values (or one of a tuple of them)."""
    return [
        row
        for row in rows
        if "failure" not in row
        and all(
            row.get(key) in value if isinstance(value, tuple) else row.get(key) == value
            for key, value in wanted.items()
        )
    ]


def _shapes(models: tuple[str, ...], tokens: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"{m}/{t}/{side}" for m in models for t in tokens for side in ("gate", "down"))


_LARGE = _shapes(("olmoe", "mixtral"), (4096,))
_SMALL = _shapes(("olmoe", "mixtral"), (8, 32))


def _where(row: Row) -> str:
    return f"{row['chip']} {row['shape']} {row['sizes']}"


def _same(rows: Iterable[Row], row: Row, contender: str) -> list[Row]:
    keys = ("chip", "shape", "sizes")
    found = _of(rows, **{key: row[key] for key in keys})
    return [other for other in found if str(other["contender"]).startswith(contender)]


def over_megablox(rows: Iterable[Row]) -> Measured:
    """Modelled time of our bf16 over megablox's best tiling."""
    rows = list(rows)
    return {
        _where(row): row["modelled"] / min(other["modelled"] for other in others)
        for row in _of(rows, chip=TPUS, shape=_LARGE, contender="ours bf16")
        if (others := _same(rows, row, "megablox"))
    }


def _as_fast_as_hbm(measure: Callable[[Iterable[Row]], Measured]):
    """A measure of our kernels as they would be if nothing but HBM held them up."""

    def ideal(rows: Iterable[Row]) -> Measured:
        return measure(
            {**row, "modelled": row["bound"], "useful": row["useful"] * row["over_bound"]}
            if str(row["contender"]).startswith("ours") and "modelled" in row
            else row
            for row in rows
        )

    return ideal


def useful(rows: Iterable[Row]) -> Measured:
    """Useful matrix-unit cycles over modelled cycles."""
    found = _of(rows, chip=TPUS, shape=_LARGE, contender="ours bf16")
    return {_where(row): row["useful"] for row in found}


def spills(rows: Iterable[Row]) -> Measured:
    """Spills and fills in the inner loop."""
    found = _of(rows, chip=TPUS, shape=_LARGE, contender="ours bf16")
    return {_where(row): float(row["spills"]) for row in found}


def over_hbm(rows: Iterable[Row]) -> Measured:
    """Modelled time of int8 and int4 over their own HBM bound."""
    wanted = ("ours int8 g128", "ours int4 g128")
    found = _of(rows, chip=TPUS, shape=_SMALL, contender=wanted)
    return {f"{_where(row)} {row['contender']}": row["over_bound"] for row in found}


def over_push(rows: Iterable[Row]) -> Measured:
    """Modelled time of 3 and 2 bits over max(HBM bound, the cycles that bf16 takes)."""
    rows = list(rows)
    wanted = ("ours int3 g128", "ours int2 g128")
    return {
        f"{_where(row)} {row['contender']}": row["modelled"]
        / max(row["bound"], pushed[0]["cycles"])
        for row in _of(rows, chip=TPUS, shape=_SMALL, contender=wanted)
        if (pushed := _same(rows, row, "ours bf16"))
    }


def over_three_bits(rows: Iterable[Row]) -> Measured:
    """Modelled time with a fused addend of rank 32 over that of 3 bits alone."""
    rows = list(rows)
    return {
        _where(row): row["modelled"] / alone[0]["modelled"]
        for row in _of(rows, chip=TPUS, shape=_SMALL, contender="ours int3 g128 + rank 32")
        if (alone := _of(_same(rows, row, "ours int3 g128"), contender="ours int3 g128"))
    }


TPU_BARS = (
    Bar("prefill 4096, bf16: over megablox's best tiling", 0.9, True, over_megablox,
        _as_fast_as_hbm(over_megablox)),
    Bar("prefill 4096, bf16: useful matrix-unit cycles of all modelled", 0.8, False, useful,
        _as_fast_as_hbm(useful)),
    Bar("prefill 4096, bf16: spills in the inner loop", 0, True, spills),
    Bar("decode 8 and 32, int8 and int4: over their HBM bound", 1.08, True, over_hbm),
    Bar("decode 8 and 32, 3 and 2 bits: over max(HBM, push) bound", 1.1, True, over_push),
    Bar("decode, 3 bits with rank 32: over 3 bits alone", 1.15, True, over_three_bits,
        _as_fast_as_hbm(over_three_bits)),
)  # fmt: skip


def _compile(case: str, theirs: str, ours: str = "ours") -> Callable[[Iterable[Row]], Measured]:
    """Seconds to compile what the ratio of the same row is of."""
    return _cpu(case, theirs, ours, figure="compile_seconds")


def _cpu(
    case: str,
    theirs: str,
    ours: str = "ours",
    figure: str = "ratio",
    model: str | tuple[str, ...] = ("olmoe/", "mixtral/"),
) -> Callable[[Iterable[Row]], Measured]:
    """Interleaved ratio of medians, by shape and group sizes."""

    def measure(rows: Iterable[Row]) -> Measured:
        found = _of(rows, case=case, contender=ours, over=theirs)
        return {
            f"{row['shape']} {row['sizes']}": row[figure]
            for row in found
            if row["shape"].startswith(model)
        }

    return measure


_MM, _EAGER = "transformers grouped_mm", "transformers eager"
_FAST = "ours fast compile"
CPU_BARS = (
    Bar("float32, 512 tokens: over grouped_mm", 1.15, True, _cpu("forward 512", _MM)),
    Bar("float32, 4096 tokens: over grouped_mm", 1.05, True, _cpu("forward 4096", _MM)),
    Bar("float32 with backward, 512 tokens: over grouped_mm", 1.15, True,
        _cpu("gradient 512", _MM)),
    Bar("float32 with backward, 512 tokens: compile seconds", 15, True,
        _compile("gradient 512", _MM)),
    Bar("FAST_COMPILE with backward, 512 tokens: over grouped_mm", 1.5, True,
        _cpu("gradient 512", _MM, _FAST)),
    Bar("FAST_COMPILE with backward, 512 tokens: compile seconds", 3, True,
        _compile("gradient 512", _MM, _FAST)),
    Bar("float32, 1 token: over grouped_mm", 0.9, True, _cpu("forward 1", _MM)),
    Bar("float32, 8 tokens: over grouped_mm", 0.9, True, _cpu("forward 8", _MM)),
    Bar("64 experts: over ragged_dot", 1 / 20, True,
        _cpu("product 512", "ragged_dot", model="olmoe/")),
    *(
        Bar(f"int{bits}, {tokens} tokens: over our float32", bound, True,
            _cpu(f"forward {tokens}", "ours", f"ours int{bits} g128"))
        for tokens in (1, 8)
        for bits, bound in ((8, 0.6), (4, 0.55), (3, 0.65))
    ),
    Bar("bfloat16, 1 token: over eager", 0.75, True, _cpu("bfloat16 1", _EAGER)),
    Bar("bfloat16, 8 tokens: over eager", 0.75, True, _cpu("bfloat16 8", _EAGER)),
    Bar("time per token, 16x the tokens", 1.15, True, _cpu("linear", "tokens", "tokens x16")),
    Bar("time per token, 4x the experts", 1.25, True, _cpu("linear", "experts", "experts x4")),
)  # fmt: skip


def table(bars: Iterable[Bar], rows: Iterable[Row], reasons: Mapping[str, str]) -> str:
    """Markdown: each bar, its bound, the worst figure and where, and what bounds it if not met.

    reasons: name of a bar that is not met -> what the schedule or the profile shows to bound it.
    """
    rows = list(rows)
    lines = ["| bar | bound | worst | of | met |", "|---|---|---|---|---|"]
    for bar in bars:
        measured = bar.measure(rows)
        sign = "≤" if bar.below else "≥"
        if not measured:
            lines.append(f"| {bar.name} | {sign} {bar.bound:g} | not measured | | |")
            continue
        worst = (max if bar.below else min)(measured, key=lambda where: measured[where])
        kept = sum(bar.met(figure) for figure in measured.values())
        verdict = "yes" if kept == len(measured) else f"{kept} of {len(measured)}"
        ideal = bar.ideal(rows) if bar.ideal else {}
        by_hbm = sum(
            not bar.met(figure) and not bar.met(ideal.get(where, bar.bound))
            for where, figure in measured.items()
        )
        if by_hbm:
            verdict += f"; {by_hbm} out of reach of any kernel, by HBM alone"
        if kept < len(measured):
            unknown = "" if kept + by_hbm == len(measured) else "cause not shown yet"
            reason = reasons.get(bar.name, unknown)
            verdict += f": {reason}" if reason else ""
        figure = f"{measured[worst]:.3g}"
        lines.append(f"| {bar.name} | {sign} {bar.bound:g} | {figure} | {worst} | {verdict} |")
    return "\n".join(lines)
