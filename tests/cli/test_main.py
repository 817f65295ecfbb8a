"""The command line: exit status, what is printed where, what stays in the run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from moejax.checkpoint import read_manifest
from moejax.cli.main import main
from moejax.config import load_config
from moejax.core.errors import ConfigError
from tests.checkpoint.hf_folders import MIXTRAL, mixtral_tensors, write_folder


def facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def test_run_leaves_a_whole_run_folder(folder, capsys):
    """Catches a run folder without config, command, log or end, and a late first line."""
    assert main(["run", "toy", "--set", "ToyJob.name='first'"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["moejax run toy -> runs/toy", "running first"]
    assert err == ""
    run = folder / "runs" / "toy"
    config = load_config("toy", ["ToyJob.name='first'"])
    assert (run / "config.gin").read_text() == config.text
    assert (run / "log.txt").read_text().splitlines()[-1] == "running first"
    assert facts(run)["status"] == "finished"
    assert facts(run)["job"] == "ToyJob"
    assert facts(run)["config_sha256"] == config.hash
    assert facts(run)["command"] == ["moejax", "run", "toy", "--set", "ToyJob.name='first'"]
    assert Path(jax.config.jax_compilation_cache_dir) == folder / "cache" / "compiled"


def test_the_config_of_a_run_takes_the_run_up_again(folder, capsys):
    """Catches a config.gin that describes another run than the one it lies in."""
    assert main(["run", "toy.gin", "--out", "a"]) == 0
    assert main(["run", "a/config.gin"]) == 0
    assert "moejax run a/config.gin -> a" in capsys.readouterr().out
    assert len(facts(folder / "a")["resumed"]) == 1


def test_a_folder_of_another_run_is_refused(folder, capsys):
    """Catches a run that overwrites another one."""
    assert main(["run", "toy"]) == 0
    before = facts(folder / "runs" / "toy")
    assert main(["run", "toy", "--set", "bits=2"]) == 2
    err = capsys.readouterr().err
    assert "runs/toy already holds a run of another config." in err
    assert "--out" in err
    assert facts(folder / "runs" / "toy") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tpy"], "tpy: no such config.\n  Did you mean toy.gin?\n"),
        (["plan", "toy", "--set", "bit=3"], "--set bit=3: bit is never used.\n"),
        (["run", "toy", "--set", "bits=9.5"], "--set bits=9.5: ToyGrid.bits = 9.5 has type"),
        (["run", "toy", "--set", "ToyGrid.bit=9"], "ToyGrid has no parameter 'bit'.\n  Did you"),
        (["run", "toy", "--out", "toy.gin"], "toy.gin is a file, not a folder."),
        (["report", "nowhere"], "nowhere holds no run"),
        (["systems"], "configs/systems"),
    ],
)
def test_what_the_user_can_mend_ends_with_status_2(folder, capsys, arguments, message, monkeypatch):
    """Catches tracebacks for mistakes, status 0 or 1, and errors on stdout."""
    if arguments == ["systems"]:
        (folder / "configs" / "systems").mkdir(parents=True)
        (folder / "configs" / "systems" / "bare.gin").write_text("x = 1\n")
        message = "bare.gin: its header has no title."
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err + out
    assert not (folder / "runs").exists()
    with pytest.raises(Exception, match=r"."):
        main([*arguments, "--debug"])


def test_debug_shows_the_error_as_it_is(folder):
    """Catches a --debug that hides the traceback."""
    with pytest.raises(ConfigError, match="no such config"):
        main(["run", "tpy", "--debug"])


@pytest.mark.parametrize(
    ("fails", "status", "end", "message"),
    [
        ("spec", 2, "failed", "toy.gin, line 5: ToyGrid.group = 64 does not divide 96.\n  Use 32."),
        ("interrupt", 130, "interrupted", "moejax: interrupted. The same command takes the run"),
    ],
)
def test_how_a_run_ended_is_on_record(folder, capsys, fails, status, end, message):
    """Catches runs that stay "running" for ever, and run-time spec errors without their line."""
    assert main(["run", "toy", "--set", f"ToyJob.fails='{fails}'"]) == status
    assert message in capsys.readouterr().err
    run = folder / "runs" / "toy"
    assert facts(run)["status"] == end
    assert "Traceback" in (run / "log.txt").read_text()


def test_the_log_holds_lines_and_no_progress_bars(folder):
    """Catches a log full of what a terminal draws over, and a lost last line without end."""
    drawn = r"'\x1b[2K\r10 %\r\x1b[1mdone\x1b[0m\nlast'"
    assert main(["run", "toy", "--set", f"ToyJob.name={drawn}"]) == 0
    lines = (folder / "runs" / "toy" / "log.txt").read_text().splitlines()
    assert lines[-2:] == ["done", "last"]


def test_a_job_that_saved_its_state_ends_with_its_own_status(folder, capsys):
    """Catches an interrupted training that a job scheduler takes for finished."""
    with pytest.raises(SystemExit) as stop:
        main(["run", "toy", "--set", "ToyJob.fails='signal'"])
    assert stop.value.code == 143
    assert "The same command takes the run up" in capsys.readouterr().err
    assert facts(folder / "runs" / "toy")["status"] == "interrupted"


def test_a_defect_keeps_its_traceback(folder):
    """Catches defects of moejax that are presented as mistakes of the user."""
    with pytest.raises(ZeroDivisionError):
        main(["run", "toy", "--set", "ToyJob.fails='defect'"])
    assert facts(folder / "runs" / "toy")["status"] == "failed"
    assert "ZeroDivisionError" in (folder / "runs" / "toy" / "log.txt").read_text()


def test_plan_prints_the_plan(folder, capsys):
    """Catches a plan that runs the job or makes a folder, and "None" for a job without one."""
    assert main(["plan", "toy"]) == 0
    assert capsys.readouterr().out == "moejax plan toy\n2 passes\n"
    assert main(["plan", "toy", "--set", "ToyJob.recipe=()"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("ToyJob needs no plan")
    assert not (folder / "runs").exists()


def test_report_draws_a_run_anew(folder, capsys):
    """Catches a report command that does not reach the report."""
    (folder / "toy.gin").write_text(
        "import tests.config.toy_specs\nrun.job = @ToyQuiet()\n", encoding="utf-8"
    )
    assert main(["run", "toy"]) == 0
    assert main(["report", "runs/toy"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs/toy/report.html"
    assert (folder / "runs" / "toy" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["run", "toy", "--colour"]])
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    """Catches usage errors that run something."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: moejax" in capsys.readouterr().err


def test_help_is_fast_and_has_examples():
    """Catches a --help that imports JAX first."""
    code = (
        "import sys\nfrom moejax.cli.main import main\n"
        "try:\n    main(['--help'])\nfinally:\n    assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "moejax run quickstart" in done.stdout


def test_sigterm_reaches_the_run(folder):
    """Catches a killed run that stays "running", and the status of a success."""
    (folder / "slow_toy.py").write_text(
        "import time\nfrom moejax.core import spec\n@spec\nclass ToySlow:\n"
        "    def plan(self):\n        return None\n"
        "    def run(self, folder):\n        print('started', flush=True)\n"
        "        while True:\n            time.sleep(0.05)\n"
    )
    (folder / "slow.gin").write_text("import slow_toy\nrun.job = @ToySlow()\n")
    checkout = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(folder), str(checkout), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-m", "moejax", "run", "slow"],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        began = time.monotonic()
        assert process.stdout.readline() == "moejax run slow -> runs/slow\n"
        first_line_after = time.monotonic() - began
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err == ("moejax: interrupted. The same command takes the run up where it stopped.\n")
    assert facts(folder / "runs" / "slow")["status"] == "interrupted"
    assert first_line_after < 3


def test_convert_brings_a_folder_in(folder, capsys):
    """Catches a subcommand that drops its options, or that shows a traceback for a bad grid."""
    write_folder(folder / "hf", MIXTRAL, mixtral_tensors())
    assert main(["convert", "hf", "in", "--dtype", "bfloat16"]) == 0
    assert "coverage.tsv" in capsys.readouterr().out
    assert read_manifest(folder / "in").formats["embed"]["leaves"][""][1] == "bfloat16"
    for grid, told in {
        "SymmetricGrid(bits=9, group=None)": "SymmetricGrid.bits",
        "SymetricGrid(bits=4, group=None)": "SymmetricGrid",
        "SymmetricGrid(4)": "describes no object",
        "__import__('os').system('true')": "describes no object",
        "SymmetricGrid(bits=4)": "group",
    }.items():
        assert main(["convert", "hf", "other", "--quantize", grid]) == 2
        assert told in capsys.readouterr().err
    assert main(["convert", "nowhere", "other"]) == 2
    assert not (folder / "other").exists()


def test_processes_are_started_with_the_same_words(folder, monkeypatch):
    """Catches children that start children, and that each choose a folder of their own."""
    started = []
    monkeypatch.setattr(
        "moejax.mesh.launcher.launch", lambda command, count: started.append((command, count)) or 3
    )
    words = ["run", "toy", "--set", "bits=2", "--set", "ToyJob.name='a b'", "--processes", "2"]
    assert main(words) == 3
    [(command, count)] = started
    assert count == 2
    assert command[:3] == [sys.executable, "-m", "moejax"]
    own = ["run", "toy", "--out", "runs/toy", "--set", "bits=2", "--set", "ToyJob.name='a b'"]
    assert command[3:] == own


def test_a_job_of_one_process_is_refused_in_two(folder, monkeypatch, capsys):
    """Catches two processes that do the same work and write the same files."""
    monkeypatch.setattr("moejax.core.processes.count", lambda: 2)
    assert main(["run", "toy"]) == 2
    assert "ToyJob runs in one process, and this is one of 2." in capsys.readouterr().err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("number", ["0", "two"])
def test_processes_that_cannot_be_counted_are_refused(folder, number, capsys):
    """Catches a run of no process that ends well."""
    with pytest.raises(SystemExit) as stop:
        main(["run", "toy", "--processes", number])
    assert stop.value.code == 2
    assert "neither a number from 1 nor pod" in capsys.readouterr().err
