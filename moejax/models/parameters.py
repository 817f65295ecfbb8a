"""Models as a table of named weights, and back; abstract models from a spec and formats alone.

Names are per layer whatever the runs are: `embed`, `layers.3.moe.experts.gate`,
`layers.3.moe.router.scores.kernel`, `layers.3.attention.q`, `final_norm.scale`, `head`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import weights
from moejax.core import CheckpointError, compat
from moejax.models.block import Block
from moejax.models.decoder import DecoderLM, layers, with_layers
from moejax.models.spec import LayerSpec, ModelSpec

Weight = Any  # a jax array or a moejax.weights.Format


def parameters(model: DecoderLM) -> dict[str, Weight]:
    """Every variable of the model by its canonical name, layers unstacked."""
    named = {name: compat.read(variable) for name, variable in _variables(model, skip_runs=True)}
    for index, block in enumerate(layers(model)):
        named |= {f"layers.{index}.{name}": w for name, w in block_parameters(block).items()}
    return named


def block_parameters(block: Block) -> dict[str, Weight]:
    """Every variable of one block by its name within the layer."""
    return {name: compat.read(variable) for name, variable in _variables(block)}


def abstract_block(layer: LayerSpec, spec: ModelSpec) -> Block:
    """One block of a model, as ShapeDtypeStructs."""
    return nnx.eval_shape(lambda: Block(layer, spec, rngs=nnx.Rngs(0)))


def with_parameters(spec: ModelSpec, named: Mapping[str, Weight]) -> DecoderLM:
    """A model of `spec` that holds `named`, in whatever formats they have.

    CheckpointError when a name is missing, left over, or of another shape than the spec asks for.
    """
    model, blocks = _abstract_parts(spec)
    wanted: dict[str, nnx.Variable] = dict(_variables(model, skip_runs=True))
    for index, block in enumerate(blocks):
        wanted |= {f"layers.{index}.{name}": variable for name, variable in _variables(block)}
    _check_names(set(wanted), set(named))
    for name, variable in wanted.items():
        expected, given = weights.shape(compat.read(variable)), weights.shape(named[name])
        if tuple(expected) != tuple(given):
            raise CheckpointError(
                f"{name} has shape {tuple(given)}, the spec asks for {tuple(expected)}.",
                "The weights belong to another spec; load them with their own.",
            )
        compat.write(variable, named[name])
    return with_layers(model, blocks)


def abstract_model(
    spec: ModelSpec, formats: Mapping[str, dict] | None = None, dtype: Any = None
) -> DecoderLM:
    """A model of ShapeDtypeStructs: every shape and dtype, no memory.

    formats: name -> `weights.format_meta`, for weights that are not plain arrays.
    dtype: of plain floating-point arrays, default float32.
    """
    model, blocks = _abstract_parts(spec)
    named = {name: compat.read(v) for name, v in _variables(model, skip_runs=True)}
    for index, block in enumerate(blocks):
        named |= {f"layers.{index}.{name}": compat.read(v) for name, v in _variables(block)}
    named = retyped(named, dtype)
    for name, meta in (formats or {}).items():
        if name not in named:
            raise CheckpointError(
                f"the manifest names {name!r}, which the spec has not.", "It is damaged."
            )
        named[name] = weights.abstract_from_meta(meta)
    return with_parameters(spec, named)


def retyped(named: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Plain float parameters in `dtype`, the rest as it is.

    Router state and thresholds of rules keep theirs: a bias that moves by 1e-3 would not survive
    bfloat16.
    """

    def retype(name: str, weight: Any) -> Any:
        plain = isinstance(weight, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        if dtype is None or not plain or ".selector." in name or ".rules." in name:
            return weight
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            return weight
        if isinstance(weight, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(weight.shape, dtype)
        return weight.astype(dtype)

    return {name: retype(name, weight) for name, weight in named.items()}


def _abstract_parts(spec: ModelSpec) -> tuple[DecoderLM, list[Block]]:
    # Each kind of layer is traced once: a model of 61 layers takes seconds otherwise.
    outer = dataclasses.replace(spec, layers=())
    hollow = nnx.eval_shape(lambda: DecoderLM(outer, rngs=nnx.Rngs(0)))
    kinds = {layer: abstract_block(layer, spec) for layer in dict.fromkeys(spec.layers)}
    return hollow, [compat.copied(kinds[layer]) for layer in spec.layers]


def _variables(module: nnx.Module, skip_runs: bool = False) -> list[tuple[str, nnx.Variable]]:
    found = nnx.iter_graph(module)
    named = [
        (".".join(str(part) for part in path), node)
        for path, node in found
        if isinstance(node, nnx.Variable)
    ]
    return (
        sorted((n, v) for n, v in named if not (skip_runs and n.startswith("runs.")))
        if named
        else []
    )


def _check_names(wanted: set[str], given: set[str]) -> None:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing:
        raise CheckpointError(
            f"{len(missing)} parameters are missing, first {missing[0]!r}.",
            f"The weights hold {len(given)} tensors that fit; were they saved with another spec?",
        )
    if extra:
        raise CheckpointError(
            f"{len(extra)} parameters are left over, first {extra[0]!r}.",
            "The spec has no place for them; were they saved with another spec?",
        )
