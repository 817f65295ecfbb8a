"""Meshes of devices: their axes, and what of a model lies on each device."""

from moejax.mesh.memory import bytes_per_device
from moejax.mesh.spec import MeshSpec

__all__ = ["MeshSpec", "bytes_per_device"]
