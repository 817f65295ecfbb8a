"""Facts of accelerators and where they are published.

Peak rates, HBM and cores: docs.cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e and .../tpu7x.
Matrix units, their size and VMEM: JAX's own table, jax/_src/pallas/mosaic/tpu_info.py.
H100 SXM: NVIDIA's data sheet, nvidia.com/en-us/data-center/h100.
Links: half of the "bidirectional inter-chip interconnect (ICI) bandwidth per chip" that the same
pages give, in GBps: v5e 400, v5p 1200, v6e 800, tpu7x 1200 (tpu7x's page compares v5p, v6e and
tpu7x); H100 SXM: half of the 900 GB/s of its NVLink, on the data sheet. HBM of v5p and tpu7x is
given there in GiB and taken here as so many 10^9 bytes, so that what fits has room to spare.

Clocks of TPUs are not published with them. They follow from the peak rate,
flops/s = 2 * matrix units * size^2 * rows per cycle * clock, with one bfloat16 row per cycle on v5e
and v5p, and the two on v6e at which its schedules feed a unit. For tpu7x two are assumed, which
makes 2.2 GHz; its schedules issue up to four.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """One core of an accelerator, what a kernel on it can use; a chip has `cores` of them.

    peak: bf16 flops/s; hbm_rate: bytes/s; hbm: bytes; vmem: bytes (of a GPU: L2 cache).
    matrix_units of size x size multiply-adds take `rows` bf16 rows a cycle each.
    kind: what `jax.Device.device_kind` says; topology: the smallest name the compiler takes.
    branch_delay: bundles behind a branch that run in any case, as schedules show.
    link_rate: bytes/s out of a whole chip over all its links to others of its pod.
    """

    name: str
    kind: str
    platform: str
    topology: str
    cores: int
    peak: float
    matrix_units: int
    size: int
    rows: int
    hbm_rate: float
    hbm: float
    vmem: int
    branch_delay: int = 0
    link_rate: float = 0.0

    @property
    def flops_per_cycle(self) -> int:
        """Peak bf16 flops of all matrix units in a cycle."""
        return 2 * self.matrix_units * self.size**2 * self.rows

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak / self.flops_per_cycle

    @property
    def bytes_per_cycle(self) -> float:
        """HBM bytes in a cycle."""
        return self.hbm_rate / self.clock


V5E = Chip(
    "v5e",
    "TPU v5 lite",
    "tpu",
    "v5e:2x2",
    1,
    197e12,
    4,
    128,
    1,
    819e9,
    16e9,
    128 * _MIB,
    4,
    200e9,
)
V5P = Chip(
    "v5p",
    "TPU v5",
    "tpu",
    "v5p:2x2x1",
    2,
    459e12 / 2,
    4,
    128,
    1,
    2765e9 / 2,
    95e9 / 2,
    64 * _MIB,
    4,
    600e9,
)
V6E = Chip(
    "v6e",
    "TPU v6 lite",
    "tpu",
    "v6e:2x2",
    1,
    918e12,
    2,
    256,
    2,
    1638e9,
    32e9,
    128 * _MIB,
    4,
    400e9,
)
TPU7X = Chip(
    "tpu7x",
    "TPU7x",
    "tpu",
    "tpu7x:2x2x1",
    2,
    2307e12 / 2,
    2,
    256,
    2,
    7380e9 / 2,
    192e9 / 2,
    64 * _MIB,
    6,
    600e9,
)
CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, TPU7X)}
"""The TPUs, by name."""

# 132 multiprocessors with 4 tensor cores each; dense bf16 peak, 1.83 GHz.
H100 = Chip(
    "h100",
    "NVIDIA H100 80GB HBM3",
    "cuda",
    "1x1x8",
    1,
    989e12,
    528,
    16,
    2,
    3350e9,
    80e9,
    50 * _MIB,
    link_rate=450e9,
)
