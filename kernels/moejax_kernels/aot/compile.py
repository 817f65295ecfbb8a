"""The parent's side: lowers programs here, compiles them in a child, reads the reports."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from moejax_kernels.aot.report import Report, read_report
from moejax_kernels.chips import CHIPS, H100, Chip


class CompileError(ValueError):
    """The compiler refused a program; the message is its own."""


class CompilerMissing(ImportError):
    """No compiler for the platform is installed; the message says what to install."""


class Program(NamedTuple):
    """A function, jitted or not, and the shapes it is compiled for.

    shapes: pytrees of `jax.ShapeDtypeStruct` (or arrays) for the positional arguments. For a
        sharded program they carry `NamedSharding(jax.sharding.AbstractMesh(...), ...)`.
    mesh: sizes of that mesh, () on one device.
    """

    function: Callable
    shapes: Sequence[Any]
    mesh: tuple[int, ...] = ()


def compile_for(
    function: Callable,
    *shapes: Any,
    chip: str | Chip = "v5e",
    topology: str | None = None,
    mesh: tuple[int, ...] = (),
    schedules: bool = True,
) -> Report:
    """Compiles one function for a chip, or for a topology of it; see `compile_all`."""
    programs = {"program": Program(function, shapes, mesh)}
    return compile_all(programs, chip=chip, topology=topology, schedules=schedules)["program"]


def compile_all(
    programs: Mapping[str, Program],
    *,
    chip: str | Chip = "v5e",
    topology: str | None = None,
    schedules: bool = True,
    keep_failures: bool = False,
) -> dict[str, Any]:
    """Compiles several programs in one child process: starting the compiler costs seconds.

    chip: "v5e", "v5p", "v6e", "tpu7x", "h100" or a `Chip`; topology: a name like "v5e:16x16",
        by default the chip's smallest. schedules: read the kernels' schedules too (TPU only).
    keep_failures: a program that does not compile gives its CompileError as value.
    Raises CompilerMissing without libtpu (h100: jax[cuda13]), CompileError with the reason.
    """
    chip = {**CHIPS, H100.name: H100}[chip] if isinstance(chip, str) else chip
    compiler = compiler_version(chip.platform)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="aot-") as temporary:
        folder = Path(temporary)
        pending: dict[str, str] = {}
        for index, (name, program) in enumerate(programs.items()):
            place = folder / f"p{index}"
            place.mkdir()
            try:
                (place / "module.mlir").write_bytes(_lower(program, chip))
            except Exception as error:  # whatever the lowering rules of a kernel raise
                result[name] = CompileError(f"{name} does not lower for {chip.name}: {error}")
                result[name].__cause__ = error
            else:
                pending[name] = place.name
        while pending:
            meshes = {key: list(programs[name].mesh or (1,)) for name, key in pending.items()}
            died = _run(folder, chip, topology or chip.topology, meshes, schedules)
            for name, key in list(pending.items()):
                file = folder / key / "report.json"
                facts = json.loads(file.read_text()) if file.exists() else {"error": died}
                if "error" in facts:
                    reason = f"{name} does not compile for {chip.name}: {facts['error']}"
                    result[name] = CompileError(reason)
                else:
                    result[name] = read_report(folder / key, facts, chip, compiler)
                del pending[name]
                if not file.exists():
                    break  # this one ended the child: the others go on without it
    failures = [value for value in result.values() if isinstance(value, CompileError)]
    if failures and not keep_failures:
        raise failures[0]
    return {name: result[name] for name in programs}


def compiler_version(platform: str = "tpu") -> str:
    """Name and version of the platform's compiler. Raises CompilerMissing."""
    _require(platform)
    package = _PACKAGES[platform]
    return f"{package} {version(package)}"


_PACKAGES = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin"}


def _require(platform: str) -> None:
    if platform == "tpu" and find_spec("libtpu") is None:
        raise CompilerMissing("libtpu is not installed: pip install libtpu==0.0.52 (extra: aot).")
    if platform == "cuda" and find_spec("jax_cuda13_plugin") is None:
        raise CompilerMissing(
            "The CUDA compiler is not installed: pip install 'jax[cuda13]' absl-py (extra: gpu)."
        )


def _lower(program: Program, chip: Chip) -> bytes:
    function = program.function
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    # Kernels ask the mesh in use which chip they are for; a sharded program brings its own.
    device = AbstractDevice(chip.kind, 2 if chip.name == "v5p" else 1, chip.platform)
    here = AbstractMesh((), (), abstract_device=device)
    with nullcontext() if program.mesh else jax.sharding.use_abstract_mesh(here):
        lowered = jitted.trace(*program.shapes).lower(lowering_platforms=(chip.platform,))
    module = io.BytesIO()
    lowered.compiler_ir("stablehlo").operation.write_bytecode(module)
    return module.getvalue()


def _run(
    folder: Path, chip: Chip, topology: str, meshes: Mapping[str, Sequence[int]], schedules: bool
) -> str:
    """Runs one child; returns the end of what it printed."""
    dump = folder / "dump"
    dump.mkdir(exist_ok=True)
    flags = [os.environ.get("LIBTPU_INIT_ARGS", "")]
    flags += [f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true"]
    # The program itself is dumped in any case: jaxlib cannot read every asynchronous op.
    passes = "^final_(bundles|hlo)" if schedules else "^none$"
    flags += [f"--xla_jf_dump_llo_pass_label_regex={passes}"]
    request = {"chip": chip.name, "platform": chip.platform, "topology": topology, "meshes": meshes}
    (folder / "request.json").write_text(json.dumps(request))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # silences a warning; the topology decides
        "LIBTPU_INIT_ARGS": " ".join(flags),
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        # Not what this process uses: its flags are for the platform it computes on.
        "XLA_FLAGS": "--xla_gpu_autotune_level=0" if chip.platform == "cuda" else "",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    child = subprocess.run(
        [sys.executable, "-m", "moejax_kernels.aot.child", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    return f"the compiler's process ended with {child.returncode}:\n{child.stderr[-4000:]}"
