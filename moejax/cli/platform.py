"""Which platform JAX may start, and on how many threads, decided before it is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import MutableMapping
from pathlib import Path


def choose_platform(environ: MutableMapping[str, str], devices: Path = Path("/dev")) -> None:
    """Sets JAX_PLATFORMS=cpu where libtpu is installed (to compile for TPUs) but no TPU is there.

    Otherwise `import jax` tries to start one, slowly and noisily. Does nothing when the user has
    set JAX_PLATFORMS or when a TPU or GPU is attached.
    """
    if "JAX_PLATFORMS" in environ or importlib.util.find_spec("libtpu") is None:
        return
    attached = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
    if not any(any(devices.glob(pattern)) for pattern in attached):
        environ["JAX_PLATFORMS"] = "cpu"


def one_blas_thread(environ: MutableMapping[str, str]) -> None:
    """Sets OPENBLAS_NUM_THREADS=1 unless the user has set it.

    On CPUs, XLA factorises through OpenBLAS, from threads of its own. OpenBLAS's threads spin while
    they wait for each other; where another process has a core, that made a layer's GPTQ take 13 s
    instead of 0.1.
    """
    environ.setdefault("OPENBLAS_NUM_THREADS", "1")
