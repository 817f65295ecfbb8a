"""How a weight travels: JSON-ready metadata, named leaves, and shapes without data.

    {"format": "Packed", "meta": {"bits": 4, "group": 32},
     "leaves": {"words": [[8, 16, 64], "uint32"], ...}}

A plain array is {"format": "Dense", "meta": {}, "leaves": {"": [shape, dtype]}}: its one leaf has
the empty name, so that a file stores it under the parameter's own name. A weight inside a weight
is such a dict in place of [shape, dtype], its leaves are named "terms.0.words".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core.errors import CheckpointError, SpecError
from moejax.weights.format import FORMATS, Format, Weight

DENSE = "Dense"


def format_meta(w: Weight) -> dict[str, Any]:
    """JSON-ready description of format, meta fields and leaf shapes; works on ShapeDtypeStructs."""
    if not isinstance(w, Format):
        return {"format": DENSE, "meta": {}, "leaves": {"": _array_meta(w)}}
    leaves = {
        name: format_meta(part) if isinstance(part, Format) else _array_meta(part)
        for name, part in _parts(w)
    }
    meta = {name: getattr(w, name) for name in w.meta_fields}
    return {"format": type(w).__name__, "meta": meta, "leaves": leaves}


def abstract_from_meta(meta: Mapping[str, Any]) -> Any:
    """The weight that `format_meta` described, of ShapeDtypeStructs, checked.

    Raises CheckpointError for an unknown format, missing or surplus fields, or shapes that do not
    fit one another.
    """
    try:
        kind, fields, leaves = meta["format"], dict(meta["meta"]), dict(meta["leaves"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"weight metadata {meta!r} is damaged.", _OTHER) from error
    if kind == DENSE:
        if fields or set(leaves) != {""}:
            raise CheckpointError(f"a Dense weight has fields {fields}, {sorted(leaves)}.", _OTHER)
        return _abstract_array(leaves[""])
    cls = FORMATS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise CheckpointError(
            f"unknown weight format {kind!r}.",
            f"Known formats: {', '.join(sorted(FORMATS))}; a newer moejax may have written it.",
        )
    for name, described in leaves.items():
        part = abstract_from_meta if isinstance(described, Mapping) else _abstract_array
        _place(fields, name, part(described), kind)
    for field in dataclasses.fields(cls):
        if "None" in str(field.type):  # an absent leaf is not listed
            fields.setdefault(field.name, None)
    wrong = set(fields) ^ {field.name for field in dataclasses.fields(cls)}
    wrong |= set(meta["meta"]) ^ set(cls.meta_fields)
    if wrong:
        raise CheckpointError(f"{kind} has wrong fields: {sorted(wrong)}.", _OTHER)
    for name in cls.meta_fields:
        if not isinstance(fields[name], int) or isinstance(fields[name], bool):
            raise CheckpointError(f"{kind}.{name} = {fields[name]!r} is no integer.", _OTHER)
    weight = cls(**{name: _tuples(value) for name, value in fields.items()})
    try:
        weight.check()
    except SpecError as error:
        raise CheckpointError(f"weight metadata does not fit: {error.problem}", _OTHER) from error
    return weight


def flatten(w: Weight) -> dict[str, Array]:
    """Leaf name -> array; a plain array has the one name ""."""
    if not isinstance(w, Format):
        return {"": w}
    named = {}
    for name, part in _parts(w):
        for inner, array in flatten(part).items():
            named[f"{name}.{inner}" if inner else name] = array
    return named


def unflatten(meta: Mapping[str, Any], leaves: Mapping[str, Any]) -> Any:
    """The weight that `format_meta` described, holding `leaves` as `flatten` named them.

    Raises CheckpointError naming a leaf that is missing, surplus or of another shape or dtype.
    """
    abstract = abstract_from_meta(meta)
    expected = flatten(abstract)
    if set(expected) != set(leaves):
        wrong = sorted(set(expected) ^ set(leaves))
        raise CheckpointError(f"leaves {wrong} are missing or surplus.", _OTHER)
    for name, leaf in leaves.items():
        want = expected[name]
        if tuple(leaf.shape) != want.shape or jnp.dtype(leaf.dtype) != want.dtype:
            raise CheckpointError(
                f"leaf {name!r} is {leaf.dtype}{list(leaf.shape)}, "
                f"the manifest says {want.dtype}{list(want.shape)}.",
                _OTHER,
            )
    # flatten() walks the fields in the order in which the pytree has its leaves.
    return jax.tree.structure(abstract).unflatten([leaves[name] for name in expected])


_OTHER = "The file is damaged, or another version of moejax wrote it."


def _parts(w: Format) -> Iterator[tuple[str, Any]]:
    """(name, array or weight) of every leaf field; members of a tuple as `field.index`."""
    for field in dataclasses.fields(w):
        value = getattr(w, field.name)
        if field.name in w.meta_fields or value is None:
            continue
        if isinstance(value, tuple):
            yield from ((f"{field.name}.{i}", part) for i, part in enumerate(value))
        else:
            yield field.name, value


def _place(fields: dict[str, Any], name: str, part: Any, kind: str) -> None:
    """Puts `part` under `name` ("terms.0" into a dict of indices)."""
    field, _, index = name.partition(".")
    if index:
        members = fields.setdefault(field, {})
        if not index.isdigit() or not isinstance(members, dict):
            raise CheckpointError(f"{kind} has a leaf named {name!r}.", _OTHER)
        members[int(index)] = part
    else:
        if field in fields:
            raise CheckpointError(f"{kind} has two values for {name!r}.", _OTHER)
        fields[field] = part


def _tuples(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if sorted(value) != list(range(len(value))):
        raise CheckpointError(f"members {sorted(value)} of a weight have gaps.", _OTHER)
    return tuple(value[i] for i in range(len(value)))


def _array_meta(array: Any) -> list[Any]:
    return [list(array.shape), jnp.dtype(array.dtype).name]


def _abstract_array(described: Any) -> jax.ShapeDtypeStruct:
    try:
        shape, dtype = described
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(shape)
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"leaf {described!r} is no [shape, dtype].", _OTHER) from error
