"""Which leaves of a model train: predicates on the names that `models.partition` gives."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

from moejax.core import check_that, spec


@runtime_checkable
class Trains(Protocol):
    """Whether the leaf of a name trains: `runs.0.moe.router.scores.kernel`, `final_norm.scale`,
    `runs.0.moe.experts.up.terms[1].u`. Codes never do, whatever it says."""

    def __call__(self, name: str) -> bool: ...


@spec
class Everything:
    """All floats."""

    def __call__(self, name: str) -> bool:
        return True


@spec
class RouterOnly:
    """The routers' scores (SEER-MoE, arXiv:2404.05089; BTX's last stage, arXiv:2403.07816)."""

    def __call__(self, name: str) -> bool:
        return ".router.scores." in name


@spec
class Norms:
    """Scales and biases of norms."""

    def __call__(self, name: str) -> bool:
        return "norm." in name


@spec
class Adapters:
    """Low-rank terms beside a weight, as `compress.AddAdapters` puts them (arXiv:2106.09685)."""

    def __call__(self, name: str) -> bool:
        return ".terms[1]" in name and name.endswith((".u", ".v"))


@spec
class Matching:
    """Leaves whose name one of the globs matches; `*` runs over dots too."""

    globs: tuple[str, ...]

    def check(self) -> None:
        check_that(len(self.globs) > 0, self, "globs", "Give at least one.")

    def __call__(self, name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in self.globs)
