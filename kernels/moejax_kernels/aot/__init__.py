"""Compile for a TPU without one, and read the compiler's schedule.

    from moejax_kernels import aot

    report = aot.compile_for(f, x, w, sizes, chip="v6e")     # shapes: jax.ShapeDtypeStruct
    report.optimal_seconds, report.memory, report.hlo
    kernel = report.kernel("gmm")                            # a Pallas kernel by its name=
    print(kernel.table())                                    # regions: loops and guards, by path
    kernel.cycles({"loop0": steps + 2, "loop0/if0/if1": masked})
    kernel.spills(kernel.hot())

A region is a loop or a guarded part (`pl.when`, `lax.cond`), named by its path in `table()`. Its count
is how often it runs in one call of the kernel, all loops around it included. Loops of constant length
need no count; a guard without one runs whenever the part around it runs. The grid of a Pallas kernel is
a loop of steps + 2 trips (one to fill the pipeline, one to drain it), in which a guard holds the body;
that guard is known and runs steps times.

Many programs share one child process, which costs seconds to start:

    reports = aot.compile_all({"a": aot.Program(f, shapes_a), "b": aot.Program(g, shapes_b)}, chip="v5e")

A bundle is one cycle where nothing stalls. Waits for DMA do not show, so that the modelled time of a
kernel is max(cycles, HBM bytes / chip.bytes_per_cycle) cycles: `report.chip` has it.
"""

from moejax_kernels.aot.compile import (
    CompileError,
    CompilerMissing,
    Program,
    compile_all,
    compile_for,
)
from moejax_kernels.aot.report import Report
from moejax_kernels.aot.schedule import Region, Schedule, parse

__all__ = [
    "CompileError",
    "CompilerMissing",
    "Program",
    "Region",
    "Report",
    "Schedule",
    "compile_all",
    "compile_for",
    "parse",
]
