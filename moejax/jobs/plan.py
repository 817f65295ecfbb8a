"""What a job would do and cost, told from specs and manifests alone: no weight is loaded."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from moejax.checkpoint import payload_bytes
from moejax.compress import Step, payload
from moejax.jobs.model_source import ModelSource
from moejax.models import (
    DecoderLM,
    ModelSpec,
    abstract_model,
    cache_bytes_per_token,
    count_parameters,
    flops_per_token,
    parameters,
)


class PlannedArm(Protocol):
    """What a plan needs to know of an arm."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> ModelSource: ...

    @property
    def recipe(self) -> tuple[Step, ...]: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tables of a job to come; `str` gives them as text for a terminal."""

    title: str
    tables: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...]

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self.title, highlight=False)
        for caption, columns, rows in self.tables:
            table = Table(title=caption, title_justify="left", box=None, pad_edge=False)
            for number, column in enumerate(columns):
                table.add_column(column, justify="right" if number else "left")
            for row in rows:
                table.add_row(*row)
            console.print()
            console.print(table, highlight=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def model_table(models: dict[str, ModelSpec], context: int) -> tuple[str, tuple, tuple]:
    """Parameters total and active, what a token costs and what it leaves in the cache."""
    rows = []
    for name, spec in models.items():
        counts = count_parameters(spec)
        rows.append(
            (
                name,
                f"{counts.total:,}",
                f"{counts.active:,}",
                f"{counts.active_without_input_embedding:,}",
                f"{counts.active_without_embeddings:,}",
                f"{flops_per_token(spec, context) / 1e6:,.1f}",
                f"{cache_bytes_per_token(spec, jnp.bfloat16):,}",
                f"{4 * counts.total / 2**20:,.1f}",
            )
        )
    columns = (
        "model",
        "parameters",
        "active",
        "active, no input embedding",
        "active, no embeddings",
        f"MFLOP per token, {context} of context",
        "cache bytes per token, bfloat16",
        "float32 MiB",
    )
    return "Models", columns, tuple(rows)


def plan_arms(arms: Sequence[PlannedArm], context: int, stored: Any = jnp.bfloat16) -> Plan:
    """The plan of a compression study: what each recipe touches, and what it leaves on disk."""
    specs = {arm.model: arm.model.manifest() for arm in arms}
    sizes, touched = [], []
    for arm in arms:
        manifest = specs[arm.model]
        model = abstract_model(manifest.spec, manifest.formats)
        before = payload_bytes(model, stored)
        for number, step in enumerate(arm.recipe):
            model, names = step.outline(model)
            touched.append((arm.name, f"{number + 1} {type(step).__name__}", *_summary(names)))
        sizes.append(_sizes(arm.name, model, before, stored))
    tables = [
        model_table({a.path: m.spec for a, m in specs.items()}, context),
        ("Arms on disk", ("arm", "bytes", "of its model", "bytes per format"), tuple(sizes)),
    ]
    if touched:
        tables.append(("Tensors each pass touches", ("arm", "pass", "tensors"), tuple(touched)))
    return Plan(f"{len(arms)} arms; no weights were loaded.", tuple(tables))


def _sizes(name: str, model: DecoderLM, before: int, stored: Any) -> tuple[str, ...]:
    each = payload(model, stored)
    formats: Counter[str] = Counter()
    for parameter, weight in parameters(model).items():
        kind = type(weight).__name__ if hasattr(weight, "materialize") else jnp.dtype(stored).name
        formats[kind] += each[parameter]
    total = sum(each.values())
    parts = ", ".join(f"{kind} {size:,}" for kind, size in formats.most_common())
    return name, f"{total:,}", f"{total / before:.3f}", parts


def _summary(names: Sequence[str]) -> tuple[str]:
    """Names with their layer numbers folded: 4 x layers.*.moe.experts.gate."""
    folded: Counter[str] = Counter(_without_layer(name) for name in names)
    return (", ".join(f"{n} x {name}" if n > 1 else name for name, n in folded.items()),)


def _without_layer(name: str) -> str:
    parts = name.split(".")
    return ".".join(["layers", "*", *parts[2:]]) if parts[0] == "layers" else name
