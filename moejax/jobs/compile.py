"""The job that compiles a model's steps for a pod that nobody has yet, and reads what they cost."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from moejax_kernels import aot

from moejax.core import ConfigError, RunError, SpecError, check_that, parts, spec
from moejax.core.atomic import read_json, write_json
from moejax.jobs.on_mesh import OnMesh
from moejax.jobs.pod_advice import advice
from moejax.jobs.pod_steps import PodStep, PodTrainStep, StepProgram, bytes_on_device
from moejax.jobs.train import Train
from moejax.mesh import MeshSpec, Rules
from moejax.models import ModelSpec
from moejax.moe import Local, PaddedAllToAll, Parallel, Strategy
from moejax.report.pods import draw_pod, pod_text
from moejax.runs import RunFolder, progress

FILE = "compile.json"


@spec
class Compile:
    """Compiles each of `steps` of `model` for a topology, on `mesh`, and reports what it takes.

    topology: such as "v5e:16x16", "v5p:8x8x8", "h100x8"; `moejax compile --topology` sets it.
    strategy: of the routed layers. rules: what cuts what.
    Needs no accelerator: TPU programs want the extra `aot`, GPU programs the extra `gpu`.
    """

    model: ModelSpec
    steps: tuple[PodStep, ...]
    topology: str = "v5e:16x16"
    mesh: MeshSpec = MeshSpec(name="pod", fsdp=-1)
    strategy: Strategy = PaddedAllToAll()
    rules: Rules = Rules()

    def check(self) -> None:
        try:
            pod = aot.parse_topology(self.topology)
        except ValueError as error:
            raise SpecError(
                f"Compile.topology: {str(error).partition(';')[0]}.",
                f"{str(error).partition('; ')[2]}",
                field="topology",
            ) from error
        check_that(len(self.steps) >= 1, self, "steps", "Give at least one step.")
        names = [step.name for step in self.steps]
        check_that(len(set(names)) == len(names), self, "steps", "Give each kind of step once.")
        self.mesh.resolved(pod.devices)

    @property
    def pod(self) -> aot.Topology:
        """The chips the steps are compiled for."""
        return aot.parse_topology(self.topology)

    def plan(self) -> str:
        """What would be compiled."""
        mesh = self.mesh.resolved(self.pod.devices)
        names = ", ".join(step.name for step in self.steps)
        return f"compiles {names} for {self.topology}: {self.pod.devices} devices, {axes_of(mesh)}."

    def run(self, folder: RunFolder) -> None:
        """Leaves compile.json, a plot and a page in `folder`, and prints the tables."""
        _compiler(self.pod)
        found = {}
        with progress(len(self.steps), "compile", "steps") as bar:
            for step in self.steps:
                found[step.name] = self.compiled(step)
                bar.advance()
        facts = {
            "topology": self.topology,
            "devices": self.pod.devices,
            "hbm": self.pod.hbm,
            "mesh": axes_of(self.mesh.resolved(self.pod.devices)),
            "strategy": repr(self.strategy),
            "compiler": aot.compiler_version(self.pod.chip.platform),
            "steps": found,
        }
        write_json(folder.path / FILE, facts)
        draw_pod(folder.path / FILE)
        print(pod_text(facts))
        print(f"report: {folder.path / 'report.md'}")

    def compiled(self, step: PodStep) -> dict[str, Any]:
        """What one step takes, as JSON."""
        program = step.program(self.model, self.parallel)
        began = time.monotonic()
        try:
            report = self._report(step.name, program)
        except aot.CompileError as error:
            return self._refused(step, program, str(error))
        seconds = time.monotonic() - began
        roof = aot.roofline(
            report.hlo,
            self.pod,
            tuple(self._sizes.items()),
            functools.partial(parts.of_scope, trains=program.trains),
        )
        memory = report.memory
        used = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
        return {
            "tokens": program.tokens,
            "compile_seconds": seconds,
            "memory": memory | {"used": used},
            "held": {name: bytes_on_device(shapes) for name, shapes in program.held.items()},
            "fits": used <= self.pod.hbm,
            "parts": [_part(part) for part in (*roof.parts, roof.total)],
            "collectives": [
                {"kind": kind, "axes": axes, "runs": runs, "bytes": size}
                for (kind, axes), (runs, size) in aot.summed(roof.transfers).items()
            ],
            "unknown_loops": list(roof.unknown_loops),
            "compiler_one_trip": {
                "flops": report.flops,
                "hbm_bytes": report.hbm_bytes,
                "seconds": report.optimal_seconds,
            },
            "advice": self._advice(step, program, used),
        }

    @property
    def parallel(self) -> Parallel:
        """The mesh of the topology, as steps are traced for it."""
        chip = self.pod.chip
        cores = 2 if chip.name == "v5p" else 1
        mesh = AbstractMesh(
            tuple(self._sizes.values()),
            tuple(self._sizes),
            axis_types=(AxisType.Auto,) * len(self._sizes),
            abstract_device=AbstractDevice(chip.kind, cores, chip.platform),
        )
        return Parallel(mesh, self.strategy, self.rules)

    @property
    def _sizes(self) -> dict[str, int]:
        return self.mesh.resolved(self.pod.devices).shape

    def _report(self, name: str, program: StepProgram) -> aot.Report:
        sizes = tuple(self._sizes.values())
        programs = {name: aot.Program(program.function, program.arguments, sizes)}
        return aot.compile_all(
            programs, chip=self.pod.chip, topology=self.pod.compiler, schedules=False
        )[name]

    def _refused(self, step: PodStep, program: StepProgram, reason: str) -> dict[str, Any]:
        """A step that the compiler did not take; RunError unless memory was the reason."""
        used = aot.memory_wanted(reason)
        if used is None:
            raise RunError(
                f"the {step.name} step does not compile for {self.topology}: {reason}",
                "Report it with the config; another strategy or mesh may compile.",
            )
        return {
            "tokens": program.tokens,
            "memory": {"used": used},
            "held": {name: bytes_on_device(shapes) for name, shapes in program.held.items()},
            "fits": False,
            "parts": [],
            "collectives": [],
            "advice": self._advice(step, program, used),
        }

    def _advice(self, step: PodStep, program: StepProgram, used: float) -> list[str]:
        held = {name: bytes_on_device(shapes) for name, shapes in program.held.items()}
        mesh = self.mesh.resolved(self.pod.devices)
        return advice(step, mesh, self.rules, held, used, self.pod.hbm)


def axes_of(mesh: MeshSpec) -> str:
    """The axes of more than one device: "fsdp 8, expert 64"."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "whole"


def _compiler(pod: aot.Topology) -> None:
    try:
        aot.compiler_version(pod.chip.platform)
    except aot.CompilerMissing as error:
        problem, _, fix = str(error).partition(": ")
        raise RunError(f"{problem} ({pod.name} wants it).", f"Run {fix}") from error


def _part(part: aot.Part) -> dict[str, Any]:
    flat = dataclasses.asdict(part)
    return {**flat.pop("work"), **flat, "bound": part.bound}


def for_pod(job: Any, topology: str | None) -> Compile:
    """A job as one that compiles: itself if it does, the training step of a `Train`.

    A `Train` without a mesh has its parameters cut over all devices. Raises ConfigError for other
    jobs, and where nothing says the topology.
    """
    if isinstance(job, Compile):
        return job if topology is None else dataclasses.replace(job, topology=topology)
    if not isinstance(job, Train):
        raise ConfigError(
            f"{type(job).__name__} has no step that could be compiled for a pod.",
            "Name a config that runs Train or Compile.",
        )
    if topology is None:
        raise ConfigError("no topology is given.", "Add --topology v5e:16x16, or another one.")
    on = job.on or OnMesh(mesh=MeshSpec(name="pod", fsdp=-1), strategy=Local())
    step = PodTrainStep(
        batch=job.batch,
        length=job.length,
        accumulate=job.accumulate,
        optimizer=job.optimizer,
        losses=job.losses,
        compute_dtype=job.compute_dtype,
        remat=job.remat,
    )
    return Compile(
        model=job.model,
        steps=(step,),
        topology=topology,
        mesh=on.mesh,
        strategy=on.strategy,
        rules=on.rules,
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """What a run of `Compile` left; RunError when there is nothing, or it is damaged."""
    return read_json(folder / FILE)
