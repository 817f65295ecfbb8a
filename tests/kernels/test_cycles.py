"""Kernels keep their cycles; where a change is meant: `experiments.benchmarks.guard --record`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from moejax_kernels import aot
from moejax_kernels.chips import CHIPS

from experiments.benchmarks import guard


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra: aot)")
@pytest.mark.parametrize("chip", CHIPS)
def test_cycles_do_not_grow(chip):
    """Catches a kernel that takes 10 % more cycles than recorded, or no longer compiles."""
    compiler = aot.compiler_version()
    before = guard.recorded(chip, compiler)
    if before is None:
        pytest.skip(f"no cycles are recorded for {compiler}: run the guard with --record")
    assert guard.grown(guard.measure(chip), before) == {}


def test_growth_is_noticed():
    """Catches a guard that compares nothing, or forgives a case that is new."""
    before = {"a": 100.0, "b": 100.0, "gone": 5.0}
    wrong = guard.grown({"a": 109.0, "b": 111.0, "c": 1.0}, before)
    assert set(wrong) == {"b", "c"} and "1.11" in wrong["b"]
