"""Names of groups of chips: "v5p:8x8x8", "h100x8"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moejax_kernels.chips import CHIPS, H100, TPU7X, V5P, Chip

_DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
_NAME = re.compile(r"(?P<chip>[a-z0-9]+):(?P<sizes>\d+(?:x\d+)*)$")
_GPUS = re.compile(r"h100x(?P<count>\d+)$")


@dataclass(frozen=True)
class Topology:
    """Chips that are linked, and what one JAX device of them has.

    name: as users write it; compiler: as the compiler wants it; devices: how many JAX sees. A v5p
    chip is one device with two cores, a tpu7x chip two devices.
    """

    name: str
    chip: Chip
    compiler: str
    devices: int

    @property
    def _cores(self) -> int:
        return 2 if self.chip is V5P else 1

    @property
    def hbm(self) -> float:
        """Bytes of HBM of a device."""
        return self.chip.hbm * self._cores

    @property
    def hbm_rate(self) -> float:
        """HBM bytes/s of a device."""
        return self.chip.hbm_rate * self._cores

    @property
    def peak(self) -> float:
        """Peak bfloat16 flops/s of a device."""
        return self.chip.peak * self._cores

    @property
    def link_rate(self) -> float:
        """Bytes/s out of a device over all its links."""
        return self.chip.link_rate / (2 if self.chip is TPU7X else 1)


def parse_topology(name: str) -> Topology:
    """The topology of that name. ValueError where there is none, saying which there are."""
    if gpus := _GPUS.match(name):
        count = int(gpus["count"])
        return Topology(name, H100, f"1x1x{count}", count)
    found = _NAME.match(name)
    if found is None or found["chip"] not in CHIPS:
        known = ", ".join(sorted(CHIPS))
        raise ValueError(
            f"topology {name!r} is unknown; write a chip ({known}) and a grid, such as v5e:16x16 "
            "or v5p:8x8x8, or h100x8."
        )
    chip = CHIPS[found["chip"]]
    sizes = [int(size) for size in found["sizes"].split("x")]
    if len(sizes) != _DIMENSIONS[chip.name] or min(sizes) < 1:
        example = "x".join("4" * _DIMENSIONS[chip.name])
        raise ValueError(
            f"topology {name!r} has {len(sizes)} dimensions; {chip.name} is a torus of "
            f"{_DIMENSIONS[chip.name]}, such as {chip.name}:{example}."
        )
    devices = math.prod(sizes) * (2 if chip is TPU7X else 1)
    return Topology(name, chip, name, devices)


_WANTED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_wanted(refusal: str) -> float | None:
    """HBM bytes of a device that a program wants, from the words in which the compiler refuses it.

    None where memory was not the reason.
    """
    found = _WANTED.search(refusal)
    return float(found[1]) * _UNITS[found[2]] if found else None
