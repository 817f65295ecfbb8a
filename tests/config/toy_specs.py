"""A small world of specs, so that the tests of configs need no model."""

from __future__ import annotations

from typing import Any

from moejax.core import check_that, spec
from moejax.core.errors import SpecError


@spec
class ToyProgram:
    """An allocation of bits, like the ones a compression pass takes."""

    average_bits: float
    choices: tuple[int, ...] = (1, 2, 3)

    def check(self) -> None:
        check_that(
            min(self.choices) <= self.average_bits <= max(self.choices),
            self,
            "average_bits",
            f"Choose a value from {min(self.choices)} to {max(self.choices)}.",
        )


@spec
class ToySilent:
    """A spec without fields."""


@spec
class ToyGrid:
    """A pass with a value of its own, a number or a spec, and a spec as default."""

    bits: int | ToyProgram = 4
    group: int | None = 32
    clip: float = float("inf")
    shape: ToySilent = ToySilent()


@spec
class ToyJob:
    """A job: writes its recipe into results.json, or fails as it is told."""

    recipe: tuple[ToyGrid, ...]
    name: str = "toy"
    budget: ToyProgram = ToyProgram(average_bits=2.5)
    fails: str = ""
    clip: float = 1.0  # a field that its parts have too

    def check(self) -> None:
        for grid in self.recipe:
            check_that(grid.clip > 0, grid, "clip", "Give a positive bound.")

    def run(self, folder: Any) -> None:
        print(f"running {self.name}")
        if self.fails == "spec":
            raise SpecError("ToyGrid.group = 64 does not divide 96.", "Use 32.", field="group")
        if self.fails == "defect":
            raise ZeroDivisionError("a defect")
        if self.fails == "interrupt":
            raise KeyboardInterrupt
        if self.fails == "signal":
            raise SystemExit(143)  # as `moejax.train` leaves after it has saved its state
        folder.results_path.write_text("{}", encoding="utf-8")

    def plan(self) -> str | None:
        return f"{len(self.recipe)} passes" if self.recipe else None


@spec
class ToyQuiet:
    """A job that leaves nothing but its run folder, and has no plan."""

    def run(self, folder: Any) -> None:
        """Does nothing."""

    def plan(self) -> None:
        return None
