"""What a model weighs and costs, told from its spec alone."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from moejax import weights
from moejax.checkpoint import payload_bytes
from moejax.compress import Quantize
from moejax.core import MoejaxError, SpecError, check_that, spec
from moejax.core.atomic import write_atomically
from moejax.jobs.plan import Plan, model_table
from moejax.mesh import MeshSpec, bytes_per_device
from moejax.models import (
    DecoderLM,
    ModelSpec,
    abstract_model,
    count_parameters,
    parameter_axes,
    parameters,
)
from moejax.runs import RunFolder

MESHES = (
    MeshSpec(name="one H100", memory_gb=80),
    MeshSpec(name="8 H100", expert=8, memory_gb=80),
    MeshSpec(name="v5e-8", expert=8, memory_gb=16),
    MeshSpec(name="v5e-64", expert=8, fsdp=8, memory_gb=16),
    MeshSpec(name="v6e-64", expert=8, fsdp=8, memory_gb=32),
    MeshSpec(name="v5p-64", expert=8, fsdp=8, memory_gb=95),
    MeshSpec(name="v5e-256", expert=8, fsdp=32, memory_gb=16),
)
_STORED = np.dtype(jnp.bfloat16)


@spec
class PlanModel:
    """A model as a plan: `moejax plan FILE` makes one of a config that describes a model only.

    context: tokens that a token attends to, for its flops. bits, group: of the formats of experts
    that are weighed beside bfloat16. meshes: where the model might lie.
    """

    model: ModelSpec
    context: int = 4096
    bits: tuple[int, ...] = (8, 4, 3, 2)
    group: int = 128
    meshes: tuple[MeshSpec, ...] = MESHES

    def check(self) -> None:
        check_that(self.context >= 1, self, "context", "Give a number of tokens, 4096 say.")

    def plan(self) -> Plan:
        """Parameters, bytes per format, bytes per token, bytes per device."""
        whole = abstract_model(self.model)
        formats: dict[str, DecoderLM | str] = {"bfloat16": whole}
        formats |= {f"{bits} bits": self._quantized(whole, bits) for bits in self.bits}
        models = {name: m for name, m in formats.items() if not isinstance(m, str)}
        before = payload_bytes(whole, _STORED)
        sizes = []
        for name, model in formats.items():
            if isinstance(model, str):
                sizes.append((name, model, "", ""))
                continue
            size = payload_bytes(model, _STORED)
            sizes.append((name, f"{size:,}", f"{size / 1e9:,.1f}", f"{size / before:.3f}"))
        places = [
            (f"{mesh.name} ({_axes(mesh)})", *(_on_device(m, mesh) for m in models.values()))
            for mesh in self.meshes
        ]
        return Plan(
            f"{published(self.model)} No weights were loaded.",
            (
                model_table({"model": self.model}, self.context),
                (
                    f"Experts in groups of {self.group}",
                    ("format", "bytes", "10^9 bytes", "of bfloat16"),
                    tuple(sizes),
                ),
                ("10^9 bytes per device", ("mesh", *models), tuple(places)),
            ),
        )

    def run(self, folder: RunFolder) -> None:
        """Writes the plan as text."""
        write_atomically(folder.path / "plan.txt", f"{self.plan()}\n")
        print(self.plan())

    def _quantized(self, model: DecoderLM, bits: int) -> DecoderLM | str:
        """The outline with its experts in so many bits, or what forbids that."""
        grid = weights.AsymmetricGrid(bits=bits, group=self.group)
        try:
            return Quantize(grid=grid).outline(model)[0]
        except MoejaxError as error:
            return error.problem


def published(model: ModelSpec) -> str:
    """The counts as papers print them: 46.7B parameters, 12.9B active, ..."""
    total, active, no_input, none = map(short, dataclasses.astuple(count_parameters(model)))
    return (
        f"{total} parameters, {active} active with both embedding matrices, {no_input} with the "
        f"output matrix alone, {none} with none."
    )


def short(count: int) -> str:
    """A count to three digits or one decimal: 671.0B, 46.7B, 1.28B, 8.15M."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if count >= unit:
            value = count / unit
            return f"{value:.1f}{name}" if value >= 10 else f"{value:.2f}{name}"
    return f"{count:,}"


def _on_device(model: DecoderLM, mesh: MeshSpec) -> str:
    try:
        size = model_bytes_per_device(model, mesh) / 1e9
    except SpecError as error:
        return error.problem.removeprefix("MeshSpec.")
    fits = mesh.memory_gb is None or size <= mesh.memory_gb
    return f"{size:,.1f}" if fits else f"{size:,.1f} of {mesh.memory_gb:g}"


def model_bytes_per_device(model: DecoderLM, mesh: MeshSpec) -> int:
    """Bytes of the parameters on each device: plain arrays in bfloat16, cut by the mesh's rules."""
    total = 0
    for name, weight in parameters(model).items():
        inside = name.split(".", 2)[2] if name.startswith("layers.") else name
        axes = weights.logical_axes(weight, parameter_axes(inside, len(weights.shape(weight))))
        plain = not isinstance(weight, weights.Format)
        for leaf, array in weights.flatten(weight).items():
            itemsize = _STORED.itemsize if plain else array.dtype.itemsize
            total += bytes_per_device(array.shape, axes[leaf], itemsize, mesh)
    return total


def _axes(mesh: MeshSpec) -> str:
    cuts = reversed(mesh.shape.items())
    return ", ".join(f"{axis} {n}" for axis, n in cuts if n > 1) or "whole"
