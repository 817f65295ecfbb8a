"""Meshes of devices: their axes, what cuts what, and what of a model lies on each device."""

from moejax.mesh.memory import bytes_per_device
from moejax.mesh.rules import MeshLike, Rules, batch_axes, batch_sharding
from moejax.mesh.spec import AXES, BANK_AXES, MODEL, TOKEN_AXES, MeshSpec

__all__ = [
    "AXES",
    "BANK_AXES",
    "MODEL",
    "TOKEN_AXES",
    "MeshLike",
    "MeshSpec",
    "Rules",
    "batch_axes",
    "batch_sharding",
    "bytes_per_device",
]
