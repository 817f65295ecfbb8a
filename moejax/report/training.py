"""The sections of a training run: loss, held-out text, expert load and speed over tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moejax.report.figures import COLOURS, QUIET, amounts, drawing, label, lines, smoothed, thinned
from moejax.report.numbers import MISSING, count, fixed
from moejax.report.page import Page
from moejax.report.tables import Cell, Column, Table, row
from moejax.runs import StudyResult, metrics

Rows = list[dict[str, Any]]
SIZE = (6.6, 4.0)


@dataclass(frozen=True)
class Curve:
    """A metric over tokens, or over steps where tokens were not written."""

    x: list[float]
    y: list[float]


def curve(rows: Rows, name: str) -> Curve:
    """The values of one metric with the tokens trained on at that step."""
    by_tokens = any(metrics.TOKENS in row for row in rows)
    x, y, tokens = [], [], 0.0
    for found in rows:
        tokens = float(found.get(metrics.TOKENS, tokens))
        if isinstance(found.get(name), int | float):
            x.append(tokens if by_tokens else float(found["step"]))
            y.append(float(found[name]))
    return Curve(x, y)


def family(rows: Rows, name: str) -> dict[str, Curve]:
    """The curves of `name/part`, by part in order of appearance; alone, `name` is the part ""."""
    names = dict.fromkeys(
        key for found in rows for key in found if key == name or key.startswith(f"{name}/")
    )
    curves = {key.removeprefix(name).removeprefix("/"): curve(rows, key) for key in names}
    if len(curves) > 1:
        curves.pop("", None)  # the parts say what the whole was made of
    return {part: found for part, found in curves.items() if found.y}


def add_training(page: Page, rows: Rows, study: StudyResult | None) -> None:
    """Curves and the final table of a training run."""
    page.section("Training")
    page.facts["training"] = {"last": _last_values(rows), "rows": len(rows)}
    baselines = {} if study is None else study.baselines
    drawn = [
        _loss(page, rows),
        _held_out(page, rows, baselines),
        _load(page, rows),
        _schedule(page, rows),
    ]
    page.figures([figure for figure in drawn if figure is not None])
    page.table(_final_table(rows))


def training_headline(rows: Rows) -> list[str]:
    """One sentence on how far the run came."""
    loss, tokens = curve(rows, metrics.LOSS), curve(rows, metrics.TOKENS)
    if not loss.y:
        return []
    far = f"{count(tokens.y[-1])} tokens" if tokens.y else f"{count(rows[-1]['step'])} steps"
    level = smoothed(np.asarray(loss.y))[-1]
    first, last = fixed(loss.y[0], 3), fixed(level, 3)
    sentence = f"Trained on {far}; loss {first} at the first step, {last} over the last ones"
    held_out = {part: c.y[-1] for part, c in family(rows, metrics.BITS_PER_BYTE).items()}
    scores = ", ".join(
        f"{name or 'held-out text'} {fixed(bits, 3)}" for name, bits in held_out.items()
    )
    return [f"{sentence}; bits per byte: {scores}." if scores else f"{sentence} (nats per token)."]


Figure = tuple[Any, str, str]


def _loss(page: Page, rows: Rows) -> Figure | None:
    found = curve(rows, metrics.LOSS)
    if not found.y:
        return None
    path, bad = page.plots / "loss.png", sum(not math.isfinite(y) for y in found.y)
    with drawing(path, *SIZE) as (_, axes):
        x_N, y_N = thinned(found.x, found.y)
        many = len(found.y) > 100
        axes.plot(
            x_N, y_N, color=COLOURS[0], alpha=0.3 if many else 1.0, linewidth=0.8 if many else 1.6
        )
        if many:
            axes.plot(*thinned(found.x, list(smoothed(np.asarray(found.y)))), color=COLOURS[0])
        axes.set_ylabel("loss (nats per token)")
        _tokens_axis(axes, rows)
    caption = "Training loss" + (" and its moving mean." if many else ".")
    return path, "Training loss", caption + (f" Steps that were not finite: {bad}." if bad else "")


def _held_out(page: Page, rows: Rows, baselines: dict[str, dict[str, float]]) -> Figure | None:
    found = family(rows, metrics.BITS_PER_BYTE)
    if not found:
        return None
    path = page.plots / "held-out.png"
    with drawing(path, *SIZE) as (_, axes):
        lines(axes, {part or "held-out text": (c.x, c.y) for part, c in found.items()})
        for name, values in baselines.items():
            for i, group in enumerate(found):
                if group in values:
                    axes.axhline(
                        values[group], color=COLOURS[i % len(COLOURS)], linestyle=":", linewidth=1
                    )
                    axes.annotate(
                        label(f"{name}, {group}"),
                        (0.99, values[group]),
                        xycoords=("axes fraction", "data"),
                        ha="right",
                        va="bottom",
                        fontsize=7.5,
                        color=QUIET,
                    )
        axes.set_ylabel("bits per byte")
        _tokens_axis(axes, rows)
    dotted = f" Dotted: {', '.join(baselines)} on the same text." if baselines else ""
    return path, "Held-out bits per byte by group", f"Held-out text, lower is better.{dotted}"


def _load(page: Page, rows: Rows) -> Figure | None:
    busiest, entropy = family(rows, metrics.LOAD_MAX), family(rows, metrics.LOAD_ENTROPY)
    if not busiest and not entropy:
        return None
    path = page.plots / "load.png"
    with drawing(path, *SIZE, nrows=2, sharex=True) as (_, (upper, lower)):
        _band(upper, busiest, COLOURS[1])
        upper.axhline(1, color=QUIET, linewidth=0.8)
        upper.set_ylabel("busiest / mean")
        _band(lower, entropy, COLOURS[2])
        lower.axhline(1, color=QUIET, linewidth=0.8)
        lower.set_ylabel("entropy / log E")
        _tokens_axis(lower, rows)
    parts = max(len(busiest), len(entropy))
    each = f" Thin: each of {parts} layers; thick: their moving mean." if parts > 1 else ""
    return path, "Expert load over training", f"Expert load; 1 is perfectly balanced in both.{each}"


def _band(axes: Any, found: dict[str, Curve], colour: str) -> None:
    single = len(found) == 1
    for each in found.values():
        x_N, y_N = thinned(each.x, each.y)
        axes.plot(
            x_N, y_N, color=colour, linewidth=1.0 if single else 0.6, alpha=1 if single else 0.3
        )
    if len(found) > 1 and len({tuple(each.x) for each in found.values()}) == 1:
        x = next(iter(found.values())).x
        mean = smoothed(np.mean([each.y for each in found.values()], axis=0))
        axes.plot(*thinned(x, list(mean)), color=colour, linewidth=1.8)


def _schedule(page: Page, rows: Rows) -> Figure | None:
    rate, speed = curve(rows, metrics.LEARNING_RATE), curve(rows, metrics.TOKENS_PER_SECOND)
    if not rate.y and not speed.y:
        return None
    path = page.plots / "schedule.png"
    with drawing(path, *SIZE, nrows=2, sharex=True) as (_, (upper, lower)):
        upper.plot(*thinned(rate.x, rate.y), color=COLOURS[0])
        upper.set_ylabel("learning rate")
        lower.plot(*thinned(speed.x, speed.y), color=COLOURS[3])
        lower.set_ylabel("tokens/s")
        lower.set_ylim(bottom=0)
        amounts(lower.yaxis)
        _tokens_axis(lower, rows)
    return (
        path,
        "Learning rate and speed",
        "Learning rate, and tokens per second of the whole step.",
    )


def _tokens_axis(axes: Any, rows: Rows) -> None:
    axes.set_xlabel("tokens" if any(metrics.TOKENS in found for found in rows) else "step")
    amounts(axes.xaxis)


def _final_table(rows: Rows) -> Table:
    values = _last_values(rows)
    columns = (Column("metric", text=True), Column("last"), Column("lowest"), Column("highest"))
    table_rows = []
    for name, value in values.items():
        found = [y for y in curve(rows, name).y if math.isfinite(y)]
        kind = type(value)
        ends = [_plain(kind(end)) for end in (min(found), max(found))] if found else [MISSING] * 2
        table_rows.append(row([name, Cell(_plain(value), repr(value)), *ends]))
    return Table("The last value that each metric had, and its range.", columns, tuple(table_rows))


def _last_values(rows: Rows) -> dict[str, float]:
    last: dict[str, float] = {}
    for found in rows:
        last.update({k: v for k, v in found.items() if isinstance(v, int | float)})
    return last


def _plain(value: float) -> str:
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return count(value)
    return f"{value:.3e}" if value and abs(value) < 1e-3 else fixed(value)
