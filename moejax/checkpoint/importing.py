"""Models from Hugging Face folders, read tensor by tensor into the arrays they end up in.

Peak host memory: the model (where devices share the host's memory, else one array of it), one
tensor of the files, and small change. Nothing of a folder is ever executed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import weights
from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.coverage import Coverage, Source, cover
from moejax.checkpoint.families import family_of
from moejax.checkpoint.family import Family
from moejax.core import CheckpointError, RunError, SpecError, compat
from moejax.core.atomic import read_json
from moejax.files import StoredTensor, as_floats, open_tensors
from moejax.files.scaled import BLOCK
from moejax.models import DecoderLM, ModelSpec, abstract_model
from moejax.models.block import run_length
from moejax.runs import Progress, progress

CONFIG = "config.json"
_CHUNK = 1 << 22  # elements looked at together when values are checked
_ALIGNMENT = 64  # bytes; XLA on CPUs takes such a buffer as it is, any other it copies

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""(name, shape) -> where the array goes. Equal neighbouring layers are one array, led by their axis
and named after the first of them, layers.0.moe.experts.gate; a quantized weight has its leaf's name
behind a dot."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model, the account of its tensors, and the config it was read from."""

    model: DecoderLM
    coverage: Coverage
    family: Family
    config: Mapping[str, Any]


def import_model(
    folder: Path | str,
    *,
    dtype: Any = None,
    grid: weights.Grid | None = None,
    sharding: Sharding | None = None,
) -> Imported:
    """The model of a folder with config.json and safetensors files.

    dtype: of plain float parameters; None for the one that most bytes have in the files (bfloat16
    where they are float8 or MXFP4). Router state is float32. grid: expert matrices are rounded to
    it as they arrive. sharding: default is the first device.
    Raises CheckpointError if the config or a file is damaged or unsupported, a tensor or parameter
    is unaccounted for, or a value is not finite.
    """
    config, family, spec, unread = read_config(folder)
    tensors = as_floats(open_tensors(folder))
    coverage = dataclasses.replace(cover(spec, family, tensors), unread=unread)
    model = load_tensors(spec, coverage, tensors, dtype=dtype, grid=grid, sharding=sharding)
    return Imported(model, coverage, family, config)


def read_config(folder: Path | str) -> tuple[dict[str, Any], Family, ModelSpec, tuple[str, ...]]:
    """config.json of a folder, its family, the model it describes, and its fields left unread."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}.", "Give the folder of a whole model.")
    try:
        config = read_json(path)
    except RunError as error:
        raise CheckpointError(f"{path} is no JSON.", "Fetch it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no table of fields.", "Fetch it again.")
    family = family_of(config, str(path))
    reader = ConfigReader(config, str(path))
    if (quantized := reader.table("quantization_config")) is not None:
        quantized.require("weight_block_size", [BLOCK, BLOCK])  # no shape of the scales tells it
    spec = read_spec(family, reader)
    return config, family, spec, tuple(reader.unread())


def read_spec(family: Family, config: ConfigReader) -> ModelSpec:
    """The model a config describes; an impossible one is a CheckpointError too."""
    try:
        return family.spec(config)
    except SpecError as error:
        raise CheckpointError(
            f"{config.where} describes no model that can be: {error.problem}", error.fix
        ) from error


def load_tensors(
    spec: ModelSpec,
    coverage: Coverage,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: Any = None,
    grid: weights.Grid | None = None,
    sharding: Sharding | None = None,
) -> DecoderLM:
    """A model of `spec` from tensors that `coverage` accounts for; arguments as `import_model`."""
    if coverage.tied is not None:
        _check_tied(coverage, tensors)
    dtype = np.dtype(_commonest(coverage, tensors) if dtype is None else dtype)
    model = abstract_model(spec, dtype=dtype)
    where = sharding or (lambda name, shape: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    variables = list(_variables(model))
    steps = sum(_slabs(coverage.sources[name]) for names, _ in variables for name in names)
    with progress(steps, "import", "matrices") as bar:
        for names, variable in variables:
            sources = [coverage.sources[name] for name in names]
            reader = _Reader(sources, tensors, compat.read(variable), bar)
            quantizes = grid is not None and sources[0].rule.of_experts and reader.ndim == 4
            if grid is not None and quantizes:
                compat.write(variable, reader.quantized(grid, where))
            else:
                compat.write(variable, reader.array(where))
    return model


class _Reader:
    """Reads one array of the model: one parameter, or that parameter of all layers of a run."""

    def __init__(
        self,
        sources: list[Source],
        tensors: Mapping[str, StoredTensor],
        like: jax.ShapeDtypeStruct,
        bar: Progress,
    ):
        self.sources, self.tensors, self.bar = sources, tensors, bar
        self.shape, self.dtype, self.ndim = like.shape, np.dtype(like.dtype), len(like.shape)
        self.stacked = sources[0].place.layer is not None
        self.name = sources[0].parameter

    def array(self, where: Sharding) -> jax.Array:
        """The array in its dtype, where it belongs; each device's part is read on its own."""
        return jax.make_array_from_callback(self.shape, where(self.name, self.shape), self._part)

    def quantized(self, grid: weights.Grid, where: Sharding) -> weights.Format:
        """The array in a grid's format, rounded one matrix at a time."""
        L, E = self.shape[:2]
        buffers: dict[str, np.ndarray] = {}
        one: Any = None
        for layer, source in enumerate(self.sources):
            for expert in range(E):
                matrix = _aligned((1, *self.shape[2:]), np.dtype(np.float32))
                self._fill(matrix[0], source, expert)
                one = grid(jnp.asarray(matrix), f"{source.parameter}, expert {expert}")
                for leaf, value in weights.flatten(one).items():
                    if leaf not in buffers:
                        buffers[leaf] = _aligned((L, E, *value.shape[1:]), np.dtype(value.dtype))
                    buffers[leaf][layer, expert] = np.asarray(value)[0]
        placed = [  # in the order in which the pytree has its leaves
            jax.device_put(buffer, where(f"{self.name}.{leaf}", buffer.shape))
            for leaf, buffer in buffers.items()
        ]
        return jax.tree.structure(one).unflatten(placed)

    def _part(self, index: tuple[slice, ...] | None) -> np.ndarray:
        index = (slice(None),) * self.ndim if index is None else index
        bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        part = _aligned(tuple(stop - start for start, stop, _ in bounds), self.dtype)
        outer = bounds[0] if self.stacked else (0, 1, 1)
        inner = index[1:] if self.stacked else index
        for layer in range(*outer):
            out = part[layer - outer[0]] if self.stacked else part
            source = self.sources[layer]
            if not source.rule.of_experts:
                self._fill(out, source, None, inner)
                continue
            first, last, _ = inner[0].indices(source.shape[0])
            for expert in range(first, last):
                self._fill(out[expert - first], source, expert, inner[1:])
        return part

    def _fill(
        self,
        out: np.ndarray,
        source: Source,
        expert: int | None,
        inner: tuple[slice, ...] = (),
    ) -> None:
        """Reads one matrix or vector, of one expert where there are any, casts and checks it."""
        rule = source.rule
        tensor = self.tensors[source.tensors[expert or 0 if rule.named_experts else 0]]
        if len(source.tensors) > 1 and expert is None:
            x = np.concatenate([self.tensors[name].read() for name in source.tensors])
        elif expert is None or rule.named_experts:
            x = tensor.read()
        else:
            rows = tensor.shape[0] // source.shape[0]
            x = tensor.read(expert * rows, (expert + 1) * rows)
            x = x if rule.joined else x[0]
        x = rule.forward(x, source.index, source.sizes, source.place)[inner]
        with np.errstate(over="ignore", invalid="ignore"):
            out[...] = x
        if bad := _not_finite(out):
            raise CheckpointError(
                f"{tensor.parts[0]} holds {bad} value(s) that are NaN or infinite as {out.dtype}.",
                "The model is damaged, or its values need a wider dtype.",
            )
        self.bar.advance()


def _variables(model: DecoderLM) -> list[tuple[list[str], nnx.Variable]]:
    """(canonical names of the layers it holds, variable) of every variable of the stacked model."""
    first = [0]
    for run in model.runs:
        first.append(first[-1] + run_length(run))
    found = []
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Variable):
            continue
        parts = [str(part) for part in path]
        if parts[0] == "runs":
            inner, run = ".".join(parts[2:]), int(parts[1])
            layers = range(first[run], first[run + 1])
            found.append(([f"layers.{layer}.{inner}" for layer in layers], node))
        else:
            found.append(([".".join(parts)], node))
    return found


def _slabs(source: Source) -> int:
    return source.shape[0] if source.rule.of_experts else 1


def _commonest(coverage: Coverage, tensors: Mapping[str, StoredTensor]) -> Any:
    """The dtype of most bytes that are used; what takes two tensors to store counts as bfloat16."""
    sizes: Counter[Any] = Counter()
    for source in coverage.sources.values():
        for name in source.tensors:
            tensor = tensors[name]
            dtype = tensor.dtype if len(tensor.parts) == 1 else np.dtype(jnp.bfloat16)
            sizes[dtype] += int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
    return sizes.most_common(1)[0][0]


def _check_tied(coverage: Coverage, tensors: Mapping[str, StoredTensor]) -> None:
    """CheckpointError unless the output matrix in the files is the embedding."""
    assert coverage.tied is not None
    embed, head = tensors[coverage.sources["embed"].tensors[0]], tensors[coverage.tied]
    rows = max(1, _CHUNK // max(1, embed.shape[-1]))
    same = embed.shape == head.shape
    for first in range(0, embed.shape[0] if same else 0, rows):
        last = min(first + rows, embed.shape[0])
        same = same and np.array_equal(embed.read(first, last), head.read(first, last))
    if not same:
        raise CheckpointError(
            f"{coverage.tied} differs from the embedding, to which the config ties it.",
            "Set tie_word_embeddings to false in config.json if it is a matrix of its own.",
        )


def _not_finite(x: np.ndarray) -> int:
    """How many values are NaN or infinite, without a copy of them all."""
    rows = max(1, _CHUNK // max(1, x[:1].size)) if x.ndim else 1
    bad = 0
    for first in range(0, len(x) if x.ndim else 0, rows):
        part = x[first : first + rows]
        bad += part.size - int(np.count_nonzero(np.isfinite(part)))
    return bad


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA on CPUs takes over without a copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
