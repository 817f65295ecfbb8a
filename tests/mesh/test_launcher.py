"""Processes started together end together, and the launcher says why."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.core import RunError
from moejax.mesh.launcher import launch

ROOT = Path(__file__).parents[2]
NUMBER = "import os, signal, sys, time; number = int(os.environ['JAX_PROCESS_ID']);"
FOR_EVER = "time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", NUMBER + code]


def test_all_get_one_address_and_numbers_of_their_own(capfd):
    """Catches processes of one number, and output that does not say whose it is."""
    code = "print(number, os.environ['JAX_NUM_PROCESSES'], os.environ['JAX_COORDINATOR_ADDRESS'])"
    assert launch(python(code), 3) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    address = lines[0].split()[-1]
    assert address.startswith("127.0.0.1:")
    assert lines == [f"0 3 {address}", f"[1] 1 3 {address}", f"[2] 2 3 {address}"]


@pytest.mark.parametrize(
    ("death", "status", "words"),
    [
        ("os.kill(os.getpid(), 9)", 137, "process 1 of 2 was ended by SIGKILL"),
        ("sys.exit(3)", 3, "process 1 of 2 ended with status 3"),
    ],
)
def test_a_death_is_reported_and_ends_the_others(death, status, words, capfd):
    """Catches a launcher that waits for a process which waits for a dead one, and one that gives
    the status of the process that it killed itself."""
    code = f"{death} if number == 1 else {FOR_EVER}"
    assert launch(python(code), 2, grace_seconds=0.1) == status
    err = capfd.readouterr().err
    assert words in err and "killed process 0 after 0.1 s" in err


def test_sigterm_goes_to_all(tmp_path):
    """Catches children that live on without their launcher."""
    notes = f"open(rf'{tmp_path}/' + str(number), 'w').write('asked')"
    code = f"signal.signal(15, lambda *_: ({notes}, sys.exit(0))); print('up', flush=True);"
    launcher = (
        "import sys; from moejax.mesh.launcher import launch; sys.exit(launch(sys.argv[1:], 2))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, *python(code + FOR_EVER)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    assert process.stdout is not None
    assert {process.stdout.readline().strip() for _ in range(2)} == {"up", "[1] up"}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_no_processes_are_refused():
    """Catches a run that ends well because it ran nothing."""
    with pytest.raises(RunError, match="0 processes"):
        launch(["true"], 0)
