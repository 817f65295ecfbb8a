"""A mesh of devices as a spec."""

from __future__ import annotations

from moejax.core import check_that, spec


@spec
class MeshSpec:
    """Devices in a grid of named axes.

    data: copies of the model, each with texts of its own. fsdp: parts that a parameter is cut into
    between uses. expert: parts that a bank of experts is cut into. memory_gb: of one device, in
    10^9 bytes, None where it does not matter.
    """

    name: str = "one device"
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    memory_gb: float | None = None

    def check(self) -> None:
        for axis in ("data", "fsdp", "expert"):
            check_that(getattr(self, axis) >= 1, self, axis, "An axis has at least 1 device.")
        enough = self.memory_gb is None or self.memory_gb > 0
        check_that(enough, self, "memory_gb", "Give 10^9 bytes of one device, or None.")

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return self.data * self.fsdp * self.expert
