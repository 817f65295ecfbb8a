"""Facts of accelerators, each with its public source.

Peak rates, bandwidths and memories of TPUs: JAX's own table (jax/_src/pallas/mosaic/tpu_info.py, per
TensorCore) and docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. The clock follows from the peak:
flops = 2 * matrix units * size^2 * rows a cycle * clock. `rows` is what the compiler's schedules show.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One core of an accelerator: what a kernel on it can use.

    matrix_units of size x size multiply-adds take `rows` rows a cycle (bf16).
    clock in Hz; hbm_rate in bytes/s; hbm and vmem in bytes (vmem: shared memory of a GPU's core).
    topology: the smallest topology name the compiler takes; branch_delay: delay slots of a branch.
    """

    name: str
    platform: str
    topology: str
    cores: int
    matrix_units: int
    size: int
    rows: int
    clock: float
    hbm_rate: float
    hbm: float
    vmem: int
    branch_delay: int

    @property
    def flops_per_cycle(self) -> int:
        """Peak bf16 flops of all matrix units in a cycle."""
        return 2 * self.matrix_units * self.size**2 * self.rows

    @property
    def bytes_per_cycle(self) -> float:
        """HBM bytes in a cycle."""
        return self.hbm_rate / self.clock


_MIB = 2**20
V5E = Chip("v5e", "tpu", "v5e:2x2", 1, 4, 128, 1, 1.5e9, 8.19e11, 16e9, 128 * _MIB, 4)
V5P = Chip("v5p", "tpu", "v5p:2x2x1", 2, 4, 128, 1, 1.75e9, 2.765e12 / 2, 95e9 / 2, 64 * _MIB, 4)
V6E = Chip("v6e", "tpu", "v6e:2x2", 1, 2, 256, 2, 1.75e9, 1.64e12, 32e9, 128 * _MIB, 4)
TPU7X = Chip("tpu7x", "tpu", "tpu7x:2x2x1", 2, 2, 256, 2, 2.2e9, 7.38e12 / 2, 96e9, 64 * _MIB, 6)
CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, TPU7X)}
