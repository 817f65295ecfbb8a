"""What a kernel's author says about it, so that a benchmark can price it for any group sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moejax_kernels.aot.compile import CompileError, Program, compile_all
from moejax_kernels.aot.cost import Cost, cost
from moejax_kernels.aot.schedule import Schedule
from moejax_kernels.chips import Chip
from moejax_kernels.shapes import Shape


class Case(NamedTuple):
    """One way to compute one shape, as a compiled program with one Pallas kernel in it.

    name: as tables show it ("int4, group 128"); shape: what it computes.
    kernel: the `name=` of the pallas_call.
    counts: (schedule, group_sizes) -> executions of the regions that depend on data.
    hbm_bytes: group_sizes -> bytes that this kernel moves, each copy as often as it is made.
    least_bytes: group_sizes -> bytes that any kernel for these operands has to move.
    """

    name: str
    shape: Shape
    program: Program
    kernel: str
    counts: Callable[[Schedule, np.ndarray], Mapping[str, int]]
    hbm_bytes: Callable[[np.ndarray], float]
    least_bytes: Callable[[np.ndarray], float]


class Priced(NamedTuple):
    """A case at given group sizes on a chip; no cost and schedule, but a failure, where it failed.

    bound: cycles in which HBM moves the least bytes.
    """

    case: Case
    sizes: np.ndarray
    cost: Cost | None
    bound: float
    schedule: Schedule | None
    failure: str

    @property
    def over_bound(self) -> float:
        """Modelled time over that of the least bytes any kernel has to move."""
        return self.cost.modelled / self.bound if self.cost else float("nan")


def price(cases: Iterable[Case], chip: Chip, sizes: Mapping[str, np.ndarray]) -> list[Priced]:
    """Compiles all cases in one child and prices each at every one of the group sizes.

    sizes: label -> int [experts]; all cases have the same shape. Ordered by case, then by label.
    """
    cases = list(cases)
    programs = {f"case {index}": case.program for index, case in enumerate(cases)}
    reports: dict[str, Any] = compile_all(programs, chip=chip, keep_failures=True)
    return [
        _price(case, report, chip, group_sizes)
        for case, report in zip(cases, reports.values(), strict=True)
        for group_sizes in sizes.values()
    ]


def _price(case: Case, report: Any, chip: Chip, group_sizes: np.ndarray) -> Priced:
    bound = case.least_bytes(group_sizes) / chip.bytes_per_cycle
    if isinstance(report, CompileError):
        reason = str(report).partition(": ")[2]
        return Priced(case, group_sizes, None, bound, None, reason)
    try:
        schedule = report.kernel(case.kernel)
        found = cost(
            schedule,
            case.counts(schedule, group_sizes),
            hbm_bytes=case.hbm_bytes(group_sizes),
            flops=case.shape.flops,
        )
    except ValueError as error:  # the case does not describe this schedule
        return Priced(case, group_sizes, None, bound, None, f"cannot be counted: {error}")
    return Priced(case, group_sizes, found, bound, schedule, "")


def least_bytes(
    shape: Shape, group_sizes: np.ndarray, bytes_per_weight: float, activation: int = 2
) -> float:
    """Weights of the experts that have rows, the rows in, the rows out.

    bytes_per_weight: scales and zeros included; activation: bytes of one element of a row.
    """
    weights = np.count_nonzero(group_sizes) * shape.inputs * shape.outputs * bytes_per_weight
    return weights + shape.rows * (shape.inputs + shape.outputs) * activation
