"""A mesh of devices as a spec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from moejax.core import SpecError, check_that, spec

DATA, FSDP, NODE, EXPERT, MODEL = AXES = ("data", "fsdp", "node", "expert", "model")
TOKEN_AXES = (DATA, FSDP, NODE, EXPERT)  # what texts are cut over
BANK_AXES = (NODE, EXPERT)  # what experts are cut over


@spec
class MeshSpec:
    """Devices in a grid of named axes, from the slowest links to the fastest.

    data: copies of the model, each with texts of its own. fsdp: parts that a parameter is cut into
    between uses. node, expert: a bank of experts is cut into node * expert parts; `node` counts
    groups of devices between which links are slow, `expert` the devices within a group. model:
    parts that the hidden widths and heads are cut into (tensor parallelism). One axis may be -1:
    whatever devices the others leave. memory_gb: of one device, in 10^9 bytes, None where it does
    not matter.
    """

    name: str = "one device"
    data: int = 1
    fsdp: int = 1
    node: int = 1
    expert: int = 1
    model: int = 1
    memory_gb: float | None = None

    def check(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            fix = "An axis has at least 1 device; -1 takes what the others leave."
            check_that(size >= 1 or size == -1, self, axis, fix)
        open_axes = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(open_axes) > 1:
            raise SpecError(
                f"MeshSpec.{' and MeshSpec.'.join(open_axes)} are both -1.",
                "Only one axis can take what the others leave.",
                field=open_axes[1],
            )
        enough = self.memory_gb is None or self.memory_gb > 0
        check_that(enough, self, "memory_gb", "Give 10^9 bytes of one device, or None.")

    @property
    def shape(self) -> dict[str, int]:
        """Axis -> size; -1 where it waits for the devices."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        """How many devices the mesh has. Raises SpecError while an axis is -1."""
        for axis, size in self.shape.items():
            fix = "Give its size, or call resolved() with the number of devices."
            check_that(size != -1, self, axis, fix)
        return math.prod(self.shape.values())

    def resolved(self, devices: int) -> MeshSpec:
        """The mesh on so many devices, with no axis -1.

        Raises SpecError naming the axis at which the sizes no longer divide the devices.
        """
        taken, open_axis = 1, None
        for axis, size in self.shape.items():
            if size == -1:
                open_axis = axis
                continue
            taken *= size
            if devices % taken:
                raise SpecError(
                    f"MeshSpec.{axis} = {size} does not fit: the axes up to it take {taken} of "
                    f"{devices} devices.",
                    f"Choose sizes whose product divides {devices}.",
                    field=axis,
                )
        sizes = dict(self.shape)
        if open_axis is not None:
            sizes[open_axis] = devices // taken
        elif taken != devices:
            raise SpecError(
                f"MeshSpec has {taken} devices with data = {self.data}, there are {devices}.",
                "Set one axis to -1, or give the mesh fewer devices.",
                field="data",
            )
        return MeshSpec(name=self.name, memory_gb=self.memory_gb, **sizes)

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The jax mesh over these devices, or a topology's; None for all that there are.

        Its axes are AXES, those of size 1 included, and all of them automatic.
        """
        devices = jax.devices() if devices is None else list(devices)
        shape = self.resolved(len(devices)).shape
        automatic = (AxisType.Auto,) * len(shape)
        return jax.make_mesh(
            tuple(shape.values()), tuple(shape), axis_types=automatic, devices=devices
        )
