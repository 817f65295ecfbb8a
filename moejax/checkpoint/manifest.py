"""Saved models: `model.json` says what each parameter is, `model.safetensors` holds the arrays.

A folder is a whole model or none: the tensors are written first, the manifest with their hash last,
each under a temporary name. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import weights
from moejax.checkpoint.migrate import VERSION, migrated
from moejax.core import CheckpointError, RunError, from_json, processes, to_json
from moejax.core.atomic import read_json, write_json
from moejax.files import (
    check_finite,
    read_safetensors,
    safetensors_header,
    sha256_of_file,
    write_safetensors,
)
from moejax.models import DecoderLM, ModelSpec, parameters, retyped, with_parameters

MANIFEST = "model.json"
TENSORS = "model.safetensors"
_AGAIN = "Write the model again, or use another copy."
_FIELDS = {"version": int, "spec": dict, "parameters": dict, "facts": dict, "tensors": dict}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `model.json` says.

    formats: parameter name -> `weights.format_meta`. facts: free facts given when it was saved.
    file: name of the tensor file in the same folder; bytes, sha256: its size and hash.
    """

    spec: ModelSpec
    formats: Mapping[str, dict[str, Any]]
    facts: Mapping[str, Any]
    file: str
    bytes: int
    sha256: str


def save_model(
    folder: Path | str,
    model: DecoderLM,
    *,
    dtype: Any = None,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes a model of any formats into `folder`, over a model that may be there.

    dtype: of plain float parameters, such as jnp.bfloat16; None keeps theirs. Router state and the
    leaves of formats always keep theirs. facts: JSON-ready, such as where the model comes from.
    Raises CheckpointError naming a tensor that holds NaN or infinity, RunError if the disk is full.
    """
    folder = Path(folder)
    named = _stored(on_host(model), dtype)
    tensors = {name: np.asarray(leaf) for name, leaf in _tensors(named).items()}
    check_finite(tensors, f"the model to be saved in {folder}")
    write_safetensors(folder / TENSORS, tensors)
    manifest = Manifest(
        spec=model.spec,
        formats={name: weights.format_meta(weight) for name, weight in named.items()},
        facts=dict(facts or {}),
        file=TENSORS,
        bytes=(folder / TENSORS).stat().st_size,
        sha256=sha256_of_file(folder / TENSORS),
    )
    write_json(
        folder / MANIFEST,
        {
            "version": VERSION,
            "spec": to_json(manifest.spec),
            "parameters": manifest.formats,
            "facts": manifest.facts,
            "tensors": {
                "file": manifest.file,
                "bytes": manifest.bytes,
                "sha256": manifest.sha256,
            },
        },
    )
    return manifest


def load_model(
    folder: Path | str, *, dtype: Any = jnp.float32, spec: ModelSpec | None = None
) -> DecoderLM:
    """The model in `folder`, with every parameter in the format it was saved in.

    dtype: of plain float parameters; None keeps what is stored. Formats and router state keep
    theirs. spec: what the caller expects to find.
    Raises CheckpointError if a file is missing, truncated or changed, a value is NaN or infinite,
    or the model is of another spec (naming the first field that differs).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if spec is not None and (difference := spec_difference(spec, manifest.spec)):
        raise CheckpointError(
            f"the model in {folder} is of another spec: {difference}.",
            "Load it with the config it was saved with, or name another folder.",
        )
    _check_tensor_file(folder, manifest)
    leaves = read_safetensors(folder / manifest.file, finite=True)
    named = {}
    for name, meta in manifest.formats.items():
        described = weights.flatten(weights.abstract_from_meta(meta))
        try:
            mine = {leaf: leaves.pop(_tensor_name(name, leaf)) for leaf in described}
            named[name] = weights.unflatten(meta, jax.tree.map(jnp.asarray, mine))
        except KeyError as error:
            raise CheckpointError(f"{folder} lacks the tensor {error}.", _AGAIN) from error
        except CheckpointError as error:
            raise CheckpointError(f"{folder}, {name}: {error.problem}", error.fix) from error
    if leaves:
        raise CheckpointError(f"{folder} has a tensor too many: {min(leaves)!r}.", _AGAIN)
    return with_parameters(manifest.spec, retyped(named, dtype))


def on_host(model: DecoderLM) -> DecoderLM:
    """The model with NumPy leaves, of which layers and experts are views and no copies.

    Of a model on a mesh, every process gets all of it; they call this together.
    """
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(np.asarray, processes.fetch(state)))


def load_spec(folder: Path | str) -> ModelSpec:
    """The spec of the model in `folder`, without reading its tensors."""
    return read_manifest(folder).spec


def read_manifest(folder: Path | str) -> Manifest:
    """`model.json` of a folder, checked; tensors are not read.

    Raises CheckpointError if there is no model, the manifest is damaged, of a newer version, or
    names a tensor file outside of the folder.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no model: it has no {MANIFEST}.",
            "Name a folder that a run wrote; an interrupted save leaves none.",
        )
    try:
        data = read_json(path)
    except RunError as error:
        raise CheckpointError(error.problem, _AGAIN) from error
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise CheckpointError(f"{path} is not the manifest of a model.", "Name another folder.")
    if not 1 <= data["version"] <= VERSION:
        raise CheckpointError(
            f"{path} has version {data['version']}, this moejax reads versions 1 to {VERSION}.",
            "Load it with the moejax that wrote it.",
        )
    for field, kind in _FIELDS.items():
        if not isinstance(data.get(field), kind):
            raise CheckpointError(f"{path} is damaged: {field!r} is missing or wrong.", _AGAIN)
    spec, file = from_json(migrated(data)["spec"]), data["tensors"].get("file")
    if not isinstance(spec, ModelSpec):
        raise CheckpointError(f"{path} holds a {type(spec).__name__}, not a ModelSpec.", _AGAIN)
    if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\:\0"):
        raise CheckpointError(
            f"{path} names the tensor file {file!r}, which is not a name in its folder.",
            "Do not use it: no moejax wrote that.",
        )
    size, digest = data["tensors"].get("bytes"), data["tensors"].get("sha256")
    if not isinstance(size, int) or not isinstance(digest, str):
        raise CheckpointError(f"{path} is damaged: no size or hash of {file}.", _AGAIN)
    return Manifest(spec, data["parameters"], data["facts"], file, size, digest)


def stored_bytes(folder: Path | str) -> int:
    """Payload of a saved model: bytes of all its tensors, the file's header not counted."""
    manifest = read_manifest(folder)
    header = safetensors_header(Path(folder) / manifest.file)
    return sum(tensor.nbytes for tensor in header.values())


def payload_bytes(model: DecoderLM, dtype: Any = None) -> int:
    """What `stored_bytes` will say once the model is saved so; works on an abstract model."""
    return sum(weights.nbytes(weight) for weight in _stored(model, dtype).values())


def spec_difference(expected: Any, found: Any, where: str = "ModelSpec") -> str | None:
    """The first field in which two specs differ, in words; None when they are equal."""
    if dataclasses.is_dataclass(expected) and type(expected) is type(found):
        for field in dataclasses.fields(expected):
            mine, other = getattr(expected, field.name), getattr(found, field.name)
            if difference := spec_difference(mine, other, f"{where}.{field.name}"):
                return difference
        return None
    if isinstance(expected, tuple) and isinstance(found, tuple):
        if len(expected) != len(found):
            return f"{where} has {len(found)} entries, expected {len(expected)}"
        for index, (mine, other) in enumerate(zip(expected, found, strict=True)):
            if difference := spec_difference(mine, other, f"{where}[{index}]"):
                return difference
        return None
    return None if expected == found else f"{where} is {found!r}, expected {expected!r}"


def _check_tensor_file(folder: Path, manifest: Manifest) -> None:
    path = folder / manifest.file
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {manifest.file}.", _AGAIN)
    if (size := path.stat().st_size) != manifest.bytes:
        raise CheckpointError(
            f"{path} has {size} bytes, the manifest says {manifest.bytes}: it is truncated or "
            "of another save.",
            _AGAIN,
        )
    if sha256_of_file(path) != manifest.sha256:
        raise CheckpointError(f"{path} is not the file that was saved: its hash differs.", _AGAIN)


def _stored(model: DecoderLM, dtype: Any) -> dict[str, Any]:
    return retyped(parameters(model), dtype)


def _tensors(named: Mapping[str, Any]) -> dict[str, Any]:
    return {
        _tensor_name(name, leaf): array
        for name, weight in named.items()
        for leaf, array in weights.flatten(weight).items()
    }


def _tensor_name(parameter: str, leaf: str) -> str:
    return f"{parameter}.{leaf}" if leaf else parameter
