"""Several processes become one run: `jax.distributed`, started from what the environment says.

| started by | what says so | who numbers the processes |
|---|---|---|
| `moejax run --processes N`, or by hand | the variables of `PLAIN` | they do |
| srun | SLURM_STEP_NUM_TASKS above 1 | JAX, from SLURM's variables |
| GKE (XPK, JobSet) on TPUs | several TPU_WORKER_HOSTNAMES or MEGASCALE_NUM_SLICES | JAX |
| ssh to each host of a TPU slice | `moejax run --processes pod` | JAX, from the metadata server |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from moejax.core import ConfigError, RunError

ADDRESS, COUNT, ID = PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HEARTBEAT_SECONDS = 60


def start(environ: Mapping[str, str] = os.environ, pod: bool = False) -> None:
    """Joins the other processes of this run, where the environment names any.

    To be called before JAX touches a device. pod: the caller knows that there are others, and JAX
    finds out which. A process that says nothing for a minute ends them all.
    Raises ConfigError for variables that are incomplete or make no sense, RunError if the others
    cannot be found.
    """
    found = join_arguments(environ)
    if (found is None and not pod) or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            **(found or {}),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"the other processes of this run cannot be joined: {str(error).splitlines()[0]}",
            f"Name them by {', '.join(PLAIN)}: docs/multi_host.md.",
        ) from error


def join_arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None where this process is alone."""
    if any(name in environ for name in PLAIN):
        return _plain(environ)
    if _integer(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return {"cluster_detection_method": "slurm"}
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in hosts or _integer(environ, "MEGASCALE_NUM_SLICES", 1) > 1:
        return {}
    return None


def _plain(environ: Mapping[str, str]) -> dict[str, Any] | None:
    missing = [name for name in PLAIN if name not in environ]
    if missing:
        given = [name for name in PLAIN if name in environ]
        raise ConfigError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, but not "
            f"{' and '.join(missing)}.",
            "Set all three on every process, or none.",
        )
    processes, process = _integer(environ, COUNT), _integer(environ, ID)
    if not 0 <= process < processes:
        raise ConfigError(
            f"{ID} = {process} is none of {COUNT} = {processes} processes.",
            "Number the processes from 0.",
        )
    host, _, port = environ[ADDRESS].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"{ADDRESS} = {environ[ADDRESS]!r} is no address.",
            "Give host and port of process 0, such as 10.0.0.1:8476.",
        )
    if processes == 1:
        return None
    return {
        "coordinator_address": environ[ADDRESS],
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name} = {text!r} is no integer.", "Give a number.") from error
