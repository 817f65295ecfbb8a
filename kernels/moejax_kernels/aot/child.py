"""The child process: compiles StableHLO programs for a topology and writes what the compiler says.

Run as `python -m moejax_kernels.aot.child FOLDER`. FOLDER/request.json lists the programs; each has
a folder with module.mlir, and gets report.json, program.hlo and the compiler's dump. libtpu reads
its flags once, when it is loaded, so that all programs share one dump folder, emptied in between.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from pathlib import Path

import jax
import numpy as np

_FINAL = re.compile(r"-final_(bundles|hlo-static-per-bundle-utilization)\.txt$")


# What XLA asks a GPU: NVIDIA's CUDA programming guide, compute capability 9.0, and the data sheet.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 85899345920
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(folder: Path) -> None:
    """Compiles every program of the request; a failure is part of the answer."""
    request = json.loads((folder / "request.json").read_text())
    devices = _devices(request["platform"], request["topology"])
    for name, mesh in request["meshes"].items():
        place = folder / name
        try:
            executable = _compile(place, devices, mesh)
        except Exception as error:  # the parent raises it as CompileError
            report = {"error": str(error) or traceback.format_exc()}
        else:
            report = _facts(executable)
            (place / "program.hlo").write_text(_hlo(executable, folder / "dump"))
        (place / "dump").mkdir()
        for file in (folder / "dump").iterdir():
            if _FINAL.search(file.name):
                file.rename(place / "dump" / file.name)
            else:
                file.unlink()
        (place / "report.json").write_text(json.dumps(report))


def _devices(platform: str, topology: str) -> list:
    from jax.experimental import topologies

    if platform == "cuda":
        described = topologies.get_topology_desc(
            "h100", platform=platform, target_config=_H100, topology=topology
        )
    else:
        described = topologies.get_topology_desc(platform=platform, topology_name=topology)
    return list(described.devices)


def _compile(place: Path, devices: list, mesh: list[int]):
    # The private parts of JAX that compile an MLIR module for given devices. The public way
    # (jax.export) wants flatbuffers and loses donated arguments.
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import mesh_utils

    if len(mesh) > 1:
        chosen = mesh_utils.create_device_mesh(mesh, devices[: int(np.prod(mesh))])
        chosen = list(chosen.flat)
    else:
        chosen = devices[: int(np.prod(mesh))]
    client = chosen[0].client
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(chosen),
        device_assignment=np.array([[device.id for device in chosen]]),
        backend=client,
    )
    with mlir.make_ir_context():
        module = ir.Module.parse((place / "module.mlir").read_bytes())
        executable = compiler.backend_compile_and_load(
            client, module, xla_client.DeviceList(tuple(chosen)), options, []
        )
    return executable


def _facts(executable) -> dict:
    memory = executable.get_compiled_memory_stats()
    try:
        cost = executable.cost_analysis()
    except jax.errors.JaxRuntimeError:  # not implemented for GPUs
        cost = None
    return {
        "cost": cost,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
    }


def _hlo(executable, dump: Path) -> str:
    """The optimized program, from the dump if there is one: jaxlib cannot read every async op."""
    for file in dump.glob("*-TLP-hlo.txt"):
        return file.read_text()
    return executable.hlo_modules()[0].to_string()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
