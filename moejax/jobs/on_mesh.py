"""A mesh and the strategy on it, as a job's config names them."""

from __future__ import annotations

from moejax.core import spec
from moejax.mesh import MeshSpec, Rules
from moejax.moe import Parallel, Strategy


@spec
class OnMesh:
    """The devices that a job runs on, and who computes what of a routed layer there.

    A property of the run: the model that it leaves and the checkpoints it can resume from are the
    same on every mesh.
    """

    mesh: MeshSpec
    strategy: Strategy
    rules: Rules = Rules()

    def build(self) -> Parallel:
        """On all devices of all processes. Raises SpecError where the mesh does not fit them."""
        return Parallel(self.mesh.build(), self.strategy, self.rules)
