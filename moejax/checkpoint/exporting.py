"""Models to Hugging Face folders that transformers loads, and packed weights beside.

The safetensors shards hold every weight as a plain array. What is in a format of moejax's own is
there as the values it stands for, and once more as it is: packed.json has `weights.format_meta` of
each such parameter, packed.safetensors its arrays (docs/exported_models.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax import weights
from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.coverage import Source, bind, tensor_shape
from moejax.checkpoint.decoder_config import without_training
from moejax.checkpoint.families import families
from moejax.checkpoint.family import Family
from moejax.checkpoint.importing import CONFIG, read_spec
from moejax.checkpoint.manifest import on_host, spec_difference
from moejax.checkpoint.rules import Place
from moejax.core import CheckpointError
from moejax.core.atomic import write_json
from moejax.files import new_folder, write_safetensors
from moejax.files.stored import INDEX, WHOLE
from moejax.models import DecoderLM, ModelSpec, parameters
from moejax.runs import Progress, progress

PACKED, PACKED_TENSORS = "packed.json", "packed.safetensors"
SHARD_BYTES = 5_000_000_000
BESIDE = (  # what a tokenizer and a generation loop need, copied as it is
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_LENGTH = "max_position_embeddings"  # read for rotary positions, and of use by itself
_NOT_OURS = ("auto_map", "quantization_config", "transformers_version")  # of the original config


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A tensor to be written: its name, shape and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_model(
    folder: Path | str,
    model: DecoderLM,
    *,
    family: Family | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Path | str | None = None,
) -> None:
    """Writes `model` to a new folder, whole or not at all.

    family: whose names and config; None for the first that can express the model. config: the
    original config.json, of which fields are kept that no part of the model depends on. dtype: of
    all tensors; None for the embedding's. Router state stays float32. shard_bytes: most bytes of
    one file, but for a tensor that is larger itself. beside: the folder whose tokenizer files are
    copied.
    Raises CheckpointError if the family cannot express the model or a value is not finite,
    RunError if the folder is there or cannot be written.
    """
    family = family_for(model.spec) if family is None else family
    fields = described(model.spec, family)
    named = parameters(on_host(model))
    kind = np.dtype(_plain(named["embed"]).dtype if dtype is None else dtype)
    planned = list(_planned(model.spec, family, named, kind))
    fields = _kept(config or {}, family) | fields | {"model_type": family.name, "dtype": kind.name}
    fields |= {"torch_dtype": kind.name}  # its name before transformers 5
    if family.architecture:
        fields["architectures"] = [family.architecture]
    with new_folder(folder) as made, progress(len(planned), "export", "tensors") as bar:
        _write_shards(made, planned, shard_bytes, bar)
        _write_packed(made, named)
        write_json(made / CONFIG, fields)
        if beside is not None:
            copy_beside(beside, made)


def family_for(spec: ModelSpec) -> Family:
    """The first family, by name, that can express a model, those that transformers loads before
    others; CheckpointError if there is none."""
    for family in sorted(dict.fromkeys(families().values()), key=lambda f: not f.architecture):
        try:
            described(spec, family)
        except CheckpointError:
            continue
        return family
    raise CheckpointError(
        "no family that moejax knows has such models.",
        "Name the family it should be, to be told what is in the way.",
    )


def described(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """The config fields of a model, of which the family makes the same model again.

    CheckpointError naming the first difference if it does not: layers pruned unevenly, a rule on
    the routing, an activation the family does not have.
    """
    fields = family.config(spec)
    back = read_spec(family, ConfigReader(fields, f"the exported {family.name} config"))
    difference = spec_difference(without_training(spec), without_training(back), "ModelSpec")
    if difference is not None:
        raise CheckpointError(
            f"a {family.name} config cannot express this model; read back, {difference}.",
            "Keep it as a moejax folder, or export to another family.",
        )
    return fields


def _kept(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields of an original config that stay true of an edited model: those the family does not
    read. Any other could contradict what it writes under another name (rope_scaling, layer_types).
    """
    reader = ConfigReader(config)
    with contextlib.suppress(CheckpointError):
        read_spec(family, reader)
    names = {*reader.unread(), _LENGTH} & set(config) - set(_NOT_OURS)
    return {name: config[name] for name in config if name in names}


def copy_beside(source: Path | str, target: Path) -> None:
    """Copies tokenizer and generation files, those that are there."""
    for name in BESIDE:
        if (found := Path(source) / name).is_file():
            shutil.copyfile(found, target / name)


def _planned(
    spec: ModelSpec, family: Family, named: Mapping[str, Any], dtype: np.dtype
) -> Iterator[_Planned]:
    """Every tensor of the export, in the order of the model's parameters."""
    shapes = {name: tuple(weights.shape(weight)) for name, weight in named.items()}
    done: set[str] = set()
    for name in sorted(named, key=_order):
        if name in done:
            continue
        for rule in family.rules:
            if (found := rule.match(name)) and rule.applies(Place(spec, found[1])):
                source = bind(name, shapes, spec, rule, *found)
                break
        else:
            raise CheckpointError(
                f"the family {family.name} has no name for {name}.", "Export to another family."
            )
        together = [pattern.format(l=source.place.layer) for pattern in source.rule.parameters]
        done |= set(together)
        values = [named[parameter] for parameter in together]
        kind = np.dtype(np.float32) if ".selector." in name else dtype
        shape = tensor_shape(source, shapes)
        for which, tensor in enumerate(source.tensors):

            def make(
                source: Source = source, values: list[Any] = values, which: int = which,
                kind: np.dtype = kind, tensor: str = tensor,
            ) -> np.ndarray:  # fmt: skip
                return _finite(tensor, _made(source, values, which).astype(kind, copy=False))

            yield _Planned(tensor, shape, kind, make)


def _made(source: Source, values: Sequence[Any], which: int) -> np.ndarray:
    """Tensor `which` of a rule from its parameters: of one expert, of all, or of none."""
    rule = source.rule
    if not rule.of_experts:
        whole = rule.inverse([_plain(value) for value in values], source.place)
        return np.split(whole, len(rule.tensors))[which] if len(rule.tensors) > 1 else whole
    experts = (which,) if rule.named_experts else range(source.shape[0])
    made = [rule.inverse([_plain(_expert(v, e)) for v in values], source.place) for e in experts]
    if rule.named_experts:
        return made[0]
    return np.concatenate(made) if rule.joined else np.stack(made)


def _expert(weight: Any, expert: int) -> Any:
    return weights.take(weight, expert) if isinstance(weight, weights.Format) else weight[expert]


def _plain(weight: Any) -> np.ndarray:
    """The weight as a NumPy array, a format as the float32 values that it stands for."""
    return np.asarray(weight.materialize() if isinstance(weight, weights.Format) else weight)


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    if not np.isfinite(x).all():
        raise CheckpointError(
            f"{name} would hold values that are NaN or infinite as {x.dtype}.",
            "The model diverged, or its values need a wider dtype.",
        )
    return x


def _write_shards(folder: Path, planned: Sequence[_Planned], most: int, bar: Progress) -> None:
    shards: list[list[_Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    place: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        file = WHOLE if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for tensor in shard:
            tensors[tensor.name] = tensor.make()
            place[tensor.name] = file
            bar.advance()
        write_safetensors(folder / file, tensors, {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in planned)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": place})


def _write_packed(folder: Path, named: Mapping[str, Any]) -> None:
    packed = {name: w for name, w in named.items() if isinstance(w, weights.Format)}
    if not packed:
        return
    leaves = {
        f"{name}.{leaf}": np.asarray(array)
        for name, weight in packed.items()
        for leaf, array in weights.flatten(weight).items()
    }
    write_safetensors(folder / PACKED_TENSORS, leaves)
    meta = {name: weights.format_meta(weight) for name, weight in packed.items()}
    write_json(folder / PACKED, {"version": 1, "parameters": meta})


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, the rest."""
    parts = name.split(".")
    if parts[0] == "layers":
        return 1, int(parts[1]), name
    return (0 if name == "embed" else 2), 0, name
