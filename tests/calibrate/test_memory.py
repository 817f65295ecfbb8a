"""The memory of a calibration, measured in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.calibrate.large_walk import LARGEST

ROOT = Path(__file__).parents[2]


def peak(what: str, cache: Path) -> int:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # so that what is freed is given back
    }
    command = [sys.executable, str(Path(__file__).with_name("large_walk.py")), what, str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_a_walk_holds_the_sums_of_one_layer(tmp_path):
    """Catches sums that are copied per batch, layers that pile up, and a second copy on the way to
    disk: the peak stays below that of a run that only counts plus 1.5 layers of sums."""
    counts, moments = (peak(what, tmp_path / what) for what in ("counts", "moments"))
    print(f"counts {counts:,}, moments {moments:,}, sums of a layer {LARGEST:,} bytes")
    assert moments >= LARGEST  # or nothing was measured
    assert moments - counts <= 1.5 * LARGEST
