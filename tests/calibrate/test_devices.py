"""Calibration over eight devices, which only a process of its own can have."""

import os
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]


def test_eight_devices_find_what_one_finds():
    """Catches batches that no device got, sums of one device alone, and a sample per device."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "XLA_FLAGS": flags,
    }
    command = [sys.executable, str(Path(__file__).with_name("sharded.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "equal", done.stderr
