"""Every tensor of the files and every parameter of the model, accounted for before data is read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from moejax import weights
from moejax.checkpoint.family import Family
from moejax.checkpoint.rules import Place, Rule, matched
from moejax.core import CheckpointError
from moejax.core.atomic import write_atomically
from moejax.files import StoredTensor
from moejax.models import ModelSpec, abstract_model, parameters

FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
_EMBED, _HEAD = "embed", "head"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter comes from: part `index` of the rule's tensors, or of each expert's.

    shape: of the parameter. sizes: last axes of all parameters that share the rule.
    """

    parameter: str
    shape: tuple[int, ...]
    rule: Rule
    index: int
    place: Place
    sizes: tuple[int, ...]
    tensors: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a tensor and what became of it (used, tied, ignored), and why."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    use: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """sources: of every parameter. rows: a line per tensor in the files. tied: the tensor that
    must equal the embedding, None where there is none. unread: config fields nobody asked for."""

    sources: Mapping[str, Source]
    rows: tuple[Row, ...]
    tied: str | None
    unread: tuple[str, ...] = ()

    def write(self, path: Path | str) -> None:
        """The whole account as tab-separated text: tensors, parameters, unread config fields."""
        lines = ["tensor\tdtype\tshape\tuse\tparameters or reason"]
        lines += [f"{r.tensor}\t{r.dtype}\t{_x(r.shape)}\t{r.use}\t{r.reason}" for r in self.rows]
        lines += ["", "parameter\tshape\ttensors\tfirst tensor"]
        for name, source in self.sources.items():
            first = source.tensors[0]
            lines.append(f"{name}\t{_x(source.shape)}\t{len(source.tensors)}\t{first}")
        lines += ["", "config field that nothing depends on"]
        write_atomically(path, "\n".join([*lines, *self.unread, ""]))


def cover(spec: ModelSpec, family: Family, tensors: Mapping[str, StoredTensor]) -> Coverage:
    """Finds the tensors of every parameter and a reason for every tensor.

    Raises CheckpointError for a parameter without tensors, a tensor of another shape or dtype than
    it needs, and a tensor that no rule uses or ignores; nothing but headers is looked at.
    """
    named = parameters(abstract_model(spec))
    shapes = {name: tuple(weights.shape(value)) for name, value in named.items()}
    sources = {name: _source(name, shapes, spec, family.rules, tensors) for name in shapes}
    used: dict[str, list[str]] = {}
    owner: dict[str, Rule] = {}
    for source in sources.values():
        for name in source.tensors:
            if owner.setdefault(name, source.rule) is not source.rule:
                raise CheckpointError(
                    f"{name} is claimed by {owner[name]} and by {source.rule}.",
                    f"The rules of the family {family.name} contradict each other.",
                )
            used.setdefault(name, []).append(source.parameter)
        _check_tensors(source, shapes, tensors)
    rows, tied = [], None
    for name, tensor in tensors.items():
        use, reason = "used", " + ".join(used.get(name, ()))
        if name not in used:
            use, reason = _excuse(name, spec, family, tensors)
            tied = name if use == "tied" else tied
        rows += [Row(p, str(tensor.dtype), tensor.shape, use, reason) for p in tensor.parts]
    if left := [row.tensor for row in rows if not row.use]:
        raise CheckpointError(
            f"{len(left)} tensors belong to no parameter of this {family.name} model, first "
            f"{left[0]}.",
            "The config describes another model, or the family lacks a rule for them.",
        )
    return Coverage(sources, tuple(rows), tied)


def _source(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    spec: ModelSpec,
    rules: Iterable[Rule],
    tensors: Mapping[str, StoredTensor],
) -> Source:
    """The first rule with this parameter whose tensor is in the files."""
    absent: str | None = None
    for rule in rules:
        if (found := rule.match(name)) is None or not rule.applies(Place(spec, found[1])):
            continue
        source = bind(name, shapes, spec, rule, *found)
        missing = [tensor for tensor in source.tensors if tensor not in tensors]
        if not missing:
            return source
        if len(missing) < len(source.tensors) or absent is None:
            absent = missing[0]
    if absent is None:
        raise CheckpointError(
            f"no rule of the family says where {name} comes from.",
            "The family has no such models, or lacks a rule.",
        )
    near = difflib.get_close_matches(absent, list(tensors)[:2000], n=2, cutoff=0.8)
    raise CheckpointError(
        f"the files lack {absent}, of which {name} is made.",
        f"Near names: {', '.join(near)}." if near else "Fetch the folder again.",
    )


def bind(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    spec: ModelSpec,
    rule: Rule,
    index: int,
    layer: int | None,
) -> Source:
    """The rule as it holds for one parameter of a model whose parameters have these shapes."""
    together = [pattern.format(l=layer) for pattern in rule.parameters]
    for other in together:
        if other not in shapes:
            raise CheckpointError(
                f"{rule.tensor} holds {other} too, which the model has not.",
                "Its config and its files belong to different models.",
            )
    experts = range(shapes[name][0]) if rule.named_experts else (0,)
    place = Place(spec, layer)
    return Source(
        parameter=name,
        shape=shapes[name],
        rule=rule,
        index=index,
        place=place,
        sizes=tuple(shapes[other][-1] for other in together),
        tensors=tuple(t.format(l=place.block, e=e) for e in experts for t in rule.tensors),
    )


def tensor_shape(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of each of the source's tensors in the files."""
    together = [shapes[p.format(l=source.place.layer)] for p in source.rule.parameters]
    if not source.rule.of_experts:
        whole = source.rule.shape(together, source.place)
        parts = len(source.rule.tensors)
        return whole if parts == 1 else (whole[0] // parts, *whole[1:])
    one = source.rule.shape([shape[1:] for shape in together], source.place)
    if source.rule.named_experts:
        return one
    E = source.shape[0]
    return (E * one[0], *one[1:]) if source.rule.joined else (E, *one)


def _check_tensors(
    source: Source, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor]
) -> None:
    expected = tensor_shape(source, shapes)
    for name in source.tensors:
        tensor = tensors[name]
        if tensor.shape != expected:
            raise CheckpointError(
                f"{name} has shape {tensor.shape}, its config asks for {expected}.",
                "Config and files belong to different models.",
            )
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{name} has dtype {tensor.dtype}, which is no weight that moejax reads.",
                "It reads float32, float16, bfloat16, float8_e4m3 with block scales and MXFP4.",
            )


def _excuse(name: str, spec: ModelSpec, family: Family, tensors: Container[str]) -> tuple[str, str]:
    """(use, reason) of a tensor that no parameter needs; an empty use if there is none."""
    if spec.tie_embeddings:
        for rule in family.rules:
            if _HEAD in rule.parameters and matched(rule.tensors[0], name) is not None:
                return "tied", f"equal to {_EMBED}"
    for ignored in family.ignored:
        if ignored.match(name, len(spec.layers), tensors):
            return "ignored", f"{ignored.tensor}: {ignored.why}"
    return "", ""


def _x(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one"
