"""The parent's side: lowers programs here, compiles them in a child, reads the reports."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moejax_kernels.aot.report import Report, read_report
from moejax_kernels.chips import CHIPS, Chip


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

    chip: "v5e", "v5p", "v6e", "tpu7x" or a `Chip`; topology: a name like "v5e:16x16", by default
        the chip's smallest. schedules: read the kernels' schedules too.
    keep_failures: a program that does not compile gives its CompileError as value.
    Raises CompilerMissing without libtpu, CompileError with the compiler's text.
    """
    chip = CHIPS[chip] if isinstance(chip, str) else chip
    if chip.platform == "tpu" and find_spec("libtpu") is None:
        raise CompilerMissing("libtpu is not installed; install moejax[aot] (or libtpu==0.0.52).")
    with tempfile.TemporaryDirectory(prefix="aot-") as temporary:
        folder = Path(temporary)
        names = {f"p{index}": name for index, name in enumerate(programs)}
        request = {"platform": chip.platform, "topology": topology or chip.topology, "programs": {}}
        for key, name in names.items():
            program = programs[name]
            (folder / key).mkdir()
            (folder / key / "module.mlir").write_bytes(_lower(program, chip.platform))
            request["programs"][key] = {"mesh": list(program.mesh or (1,))}
        (folder / "request.json").write_text(json.dumps(request))
        _run(folder, schedules)
        result: dict[str, Any] = {}
        for key, name in names.items():
            report = json.loads((folder / key / "report.json").read_text())
            if "error" in report:
                error = CompileError(f"{name} does not compile for {chip.name}: {report['error']}")
                if not keep_failures:
                    raise error
                result[name] = error
            else:
                result[name] = read_report(folder / key, report, chip)
        return result


def _lower(program: Program, platform: str) -> bytes:
    function = program.function
    jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
    lowered = jitted.trace(*program.shapes).lower(lowering_platforms=(platform,))
    module = io.BytesIO()
    lowered.compiler_ir("stablehlo").operation.write_bytecode(module)
    return module.getvalue()


def _run(folder: Path, schedules: bool) -> None:
    (folder / "dump").mkdir()
    flags = f"--xla_jf_dump_to={folder / 'dump'} --xla_jf_dump_llo_text=true" if schedules else ""
    kernels = str(Path(__file__).parents[2])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # silences a warning; the topology decides
        "LIBTPU_INIT_ARGS": flags,
        "PYTHONPATH": os.pathsep.join([kernels, os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.run(
        [sys.executable, "-m", "moejax_kernels.aot.child", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if child.returncode:
        raise CompileError(f"The compiler's process died:\n{child.stderr[-4000:]}")
