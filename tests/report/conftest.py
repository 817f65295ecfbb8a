"""One drawn report of a made-up study and one of a made-up training, shared by the tests."""

from __future__ import annotations

import pytest

from moejax.report import build_report, figures
from moejax.runs import RunFolder
from tests.report.made_up import made_up_ledger, made_up_run, made_up_study, made_up_training


@pytest.fixture(scope="session", autouse=True)
def coarse_figures():
    """Fewer pixels: most of a report's time is spent on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DOTS_PER_INCH", 50)
        yield


@pytest.fixture(scope="session")
def study_run(tmp_path_factory) -> RunFolder:
    """A study with a ledger of two arms, its report drawn."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    run = made_up_run(folder, made_up_study(), made_up_ledger(["RTN 4 bit", "GPTQ 3 bit"]))
    build_report(run)
    return run


@pytest.fixture(scope="session")
def training_run(tmp_path_factory) -> RunFolder:
    """A training without results, its report drawn."""
    run = made_up_training(tmp_path_factory.mktemp("runs") / "training", steps=120)
    build_report(run)
    return run
