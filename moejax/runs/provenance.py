"""What ran, on what: versions, git state, devices."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import moejax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
CODE = ("moejax", "kernels", "configs")


def versions() -> dict[str, str | None]:
    """Version of Python, of moejax and of the packages that decide numbers; None when absent."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "moejax": moejax.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that moejax is imported from and whether its code was changed since.

    None when moejax is installed as a package, or git is missing.
    """
    root = Path(moejax.__file__).resolve().parent.parent
    # An installed moejax may lie inside somebody else's repository: only a tracked one counts.
    if _git(root, "ls-files", "--error-unmatch", "moejax/__init__.py") is None:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *CODE)
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def device_facts() -> dict[str, Any]:
    """Platform, kind and count of the JAX devices, and the host's cores and memory in bytes."""
    import jax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
