"""Compile for a TPU without one, and read the compiler's schedule.

    from moejax_kernels import aot

    report = aot.compile_for(f, x, w, sizes, chip="v6e")     # shapes: jax.ShapeDtypeStruct
    print(report.table())                                    # flops, memory, collectives, ops
    kernel = report.kernel("gmm")                            # a Pallas kernel by its name=
    print(kernel.table())                                    # its loops and guards, by path
    counts = kernel.grid(steps) | {"loop0/if0/if1": masked}
    cost = aot.cost(kernel, counts, hbm_bytes=traffic, flops=useful)
    cost.cycles, cost.hbm_cycles, cost.modelled, cost.useful_share, cost.spills
    aot.plot(kernel, "gmm.png")

A region is a loop or a guarded part (`pl.when`, `lax.cond`), named by its path in `table()`. Its
count says how often it runs in one call of the kernel, all loops around it included. Loops of
constant length need none; a guard without one runs whenever the part around it runs. The two sides
of a `lax.cond` are two guards: count both. The grid of a Pallas kernel is one loop of steps + 2
trips (the first fills the pipeline, the last drains it) in which a guard holds the body; that guard
is recognised and runs steps times: `grid(steps)`. A guard that only asks whether there are any
steps at all may be around that loop ("if0/loop0"). Paths differ between chips: look for a region by
what it does (`own`, `matmul`, `slots`), as experiments/benchmarks/megablox.py does. On v5p two
cores share a grid with parallel axes and run the same schedule: count what one of them runs.

Starting the compiler costs seconds, so that many programs share one child process:

    programs = {"a": aot.Program(f, shapes_a), "b": aot.Program(g, shapes_b)}
    reports = aot.compile_all(programs, chip="v5e")

An op's folder describes its kernels for benchmarks and for the guard on cycles as `Case`s in a
module `cases.py` with `tpu(shape, chip) -> Iterable[Case]`.

A sharded program carries `NamedSharding`s of a `jax.sharding.AbstractMesh` in its shapes:

    mesh = jax.sharding.AbstractMesh((16, 16), ("data", "expert"))
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("data")))
    aot.compile_for(f, x, chip="v5e", topology="v5e:16x16", mesh=(16, 16))

How much memory, traffic and work a step of a whole model takes on a pod is read from such a report:

    pod = aot.parse_topology("v5e:16x16")
    found = aot.roofline(report.hlo, pod, (("data", 16), ("expert", 16)), part=lambda scope: ...)
    found.parts, found.total, aot.summed(found.transfers)      # loops counted as often as they run

A bundle is one cycle where nothing stalls. Waits for DMA do not show, so that the modelled time is
max(cycles, HBM bytes / bytes per cycle). `cycles` also holds the matrix units to their published
rate, which a schedule may exceed on paper (v5e, v5p, tpu7x).
"""

from moejax_kernels.aot.case import Case, Priced, least_bytes, price
from moejax_kernels.aot.compile import (
    CompileError,
    CompilerMissing,
    Program,
    compile_all,
    compile_for,
    compiler_version,
)
from moejax_kernels.aot.control import Region
from moejax_kernels.aot.cost import Cost, cost
from moejax_kernels.aot.hlo import Collective
from moejax_kernels.aot.plot import plot
from moejax_kernels.aot.program import parse_program
from moejax_kernels.aot.report import Report
from moejax_kernels.aot.roofline import Part, Roofline, roofline
from moejax_kernels.aot.schedule import Schedule, parse
from moejax_kernels.aot.topology import Topology, memory_wanted, parse_topology
from moejax_kernels.aot.traffic import Transfer, summed, transfers
from moejax_kernels.aot.work import Work, work_by_part

__all__ = [
    "Case",
    "Collective",
    "CompileError",
    "CompilerMissing",
    "Cost",
    "Part",
    "Priced",
    "Program",
    "Region",
    "Report",
    "Roofline",
    "Schedule",
    "Topology",
    "Transfer",
    "Work",
    "compile_all",
    "compile_for",
    "compiler_version",
    "cost",
    "least_bytes",
    "memory_wanted",
    "parse",
    "parse_program",
    "parse_topology",
    "plot",
    "price",
    "roofline",
    "summed",
    "transfers",
    "work_by_part",
]
