"""What the environment says of the other processes of a run."""

import pytest

from moejax.core import ConfigError
from moejax.mesh.processes import join_arguments

PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


def test_plain_addresses_are_taken_as_they_are():
    """Catches numbers passed on as text, which JAX refuses."""
    found = join_arguments(PLAIN)
    assert found is not None
    assert found["coordinator_address"] == "10.0.0.1:8476"
    assert (found["num_processes"], found["process_id"]) == (4, 3)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a batch script, before srun
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # one of several steps
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_a_process_that_is_alone_joins_nobody(environ):
    """Catches runs that wait for processes which never come."""
    assert join_arguments(environ) is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, {"cluster_detection_method": "slurm"}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
    ],
)
def test_what_a_scheduler_set_is_left_to_jax(environ, expected):
    """Catches four runs of one process each where one of four was started."""
    assert join_arguments(environ) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": None}, "but not JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "4"}, "none of JAX_NUM_PROCESSES = 4"),
        ({"JAX_NUM_PROCESSES": "four"}, "'four' is no integer"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "is no address"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    """Catches a process that waits for five minutes for an address that was never one."""
    environ = {name: value for name, value in {**PLAIN, **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        join_arguments(environ)
