"""One CPU platform and one persistent compilation cache for all test processes."""

import gc
import itertools
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin, see moejax/cli/platform.py
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests compile more than they compute: without LLVM's optimizations a step compiles twice as fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

_CACHE = Path(os.environ.get("MOEJAX_CACHE", Path.home() / ".cache" / "moejax")) / "xla-tests"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """The tests of a system, or of strategies, share one run, so one worker gets them all."""
    for item in items:
        if item.module.__name__.startswith(("tests.systems.", "tests.moe.parallel.")):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


MOST_MAPS = 30_000  # of memory: Linux gives a process 65,530, and every compiled program takes some
_MAPS = Path("/proc/self/maps")
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_programs():
    """Forgets compiled programs before a worker that runs most of the suite is out of memory maps.

    XLA then dies of a segmentation fault, wherever it asks for the next one.
    """
    yield
    if next(_tests) % 20 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
