"""Modelled time of a kernel: the larger of its cycles and of its HBM traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moejax_kernels.aot.schedule import Schedule
from moejax_kernels.chips import Chip


@dataclass(frozen=True)
class Cost:
    """Modelled cost of one call of a kernel on one core. Simulated: no device was asked.

    cycles: of the schedule, `Schedule.cycles`; bundles: without the matrix units' own limit.
    hbm_cycles: HBM bytes / bytes per cycle. useful_cycles: useful flops / peak flops per cycle.
    spills: vector spills and fills in the region with most of the matrix-unit work.
    """

    chip: Chip
    cycles: float
    bundles: int
    hbm_cycles: float
    useful_cycles: float
    spills: int

    @property
    def modelled(self) -> float:
        """Modelled cycles: the larger of computing and reading, which overlap."""
        return max(self.cycles, self.hbm_cycles)

    @property
    def seconds(self) -> float:
        """Modelled seconds."""
        return self.modelled / self.chip.clock

    @property
    def useful_share(self) -> float:
        """Share of the modelled cycles in which the matrix units do useful work."""
        return self.useful_cycles / self.modelled

    @property
    def over_hbm(self) -> float:
        """Modelled time over the HBM bound."""
        return self.modelled / self.hbm_cycles


def cost(
    schedule: Schedule,
    counts: Mapping[str, int] | None = None,
    *,
    hbm_bytes: float,
    flops: float = 0.0,
) -> Cost:
    """The cost of one call.

    counts: executions of the regions that depend on data, see `Schedule.executions`.
    hbm_bytes: what the call must move (weights in their format, scales, zeros, activations).
    flops: useful ones, without padding and masked rows.
    """
    chip = schedule.chip
    return Cost(
        chip=chip,
        cycles=schedule.cycles(counts),
        bundles=schedule.bundles(counts),
        hbm_cycles=hbm_bytes / chip.bytes_per_cycle,
        useful_cycles=flops / chip.flops_per_cycle,
        spills=schedule.spills(schedule.hot()),
    )
