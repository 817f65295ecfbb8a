"""Pages: complete, exact, self-contained, safe."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from moejax.core import RunError
from moejax.report import build_report, compare_reports, print_summary
from moejax.runs import RunFolder, Verdict
from tests.report.made_up import (
    made_up_arm,
    made_up_ledger,
    made_up_run,
    made_up_study,
)

HOSTILE = "<script>alert('x')</script> \"&$\\frac{1$ ../../up\n\u202e_"


def loads(html: str) -> list[str]:
    """Whatever the page would fetch."""
    found = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", html)
    found += re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", html)
    return [str(place)[:40] for place in found]


def test_the_page_has_every_arm_with_its_numbers(study_run):
    """Catches an arm left out, and numbers that were rounded away for good."""
    html = study_run.report_path.read_text()
    for arm in made_up_study().arms:
        assert f'<th scope="row">{arm.name}</th>' in html
        assert f'title="{arm.stored_bytes:,} bytes"' in html
        assert f'title="{arm.average.bits_per_byte!r}"' in html
    assert "+0.0467 ± 0.0008" in html  # GPTQ 3 bit
    assert "7.15×" in html and "+12.7 %" in html and "95.33 %" in html and "0.0794" in html
    assert "xz -9e" in html and "1.9510" in html
    assert "did not hold" in html and "2 bits stay below 0.3" in html
    assert "ledger.jsonl in the run folder" in html


def test_the_json_has_the_same_facts(study_run):
    """Catches a JSON report that knows less than the page."""
    facts = json.loads((study_run.path / "report.json").read_text())
    assert facts["changes"]["GPTQ 3 bit"]["average"]["bits_per_byte"] == pytest.approx(0.0467)
    assert facts["changes"]["dense"] is None
    assert facts["study"] == made_up_study().to_json()
    assert facts["ledger"]["arms"]["GPTQ 3 bit"]["dropped"] == 1
    assert facts["run"]["config_sha256"] == study_run.facts["config_sha256"]
    assert facts["frontier"][0] == "GPTQ 2 bit"
    names = {figure["file"] for figure in facts["figures"]}
    assert names == {f"plots/{path.name}" for path in study_run.plots.iterdir()}


@pytest.mark.parametrize("which", ["study_run", "training_run"])
def test_the_page_is_self_contained(which, request):
    """Catches a page that needs the network, another file or a script."""
    run = request.getfixturevalue(which)
    html = run.report_path.read_text()
    for place in loads(html):
        assert place.startswith(("data:image/png;base64,", "#")), place
    assert "<script" not in html and "<link" not in html and "<iframe" not in html
    assert html.count("<img ") == len(list(run.plots.iterdir())) > 2


def test_the_page_names_no_place_on_this_machine(study_run):
    """Catches a page that cannot be published as it is."""
    assert str(study_run.path.parent) not in study_run.report_path.read_text()


def test_the_training_page_has_its_curves_and_last_values(training_run):
    """Catches a page without held-out text, and a last value taken from the first line."""
    html = training_run.report_path.read_text()
    names = {path.name for path in training_run.plots.iterdir()}
    assert names == {"loss.png", "held-out.png", "load.png", "schedule.png"}
    assert "983,040" in html  # 120 steps of 8192 tokens
    assert "Steps that were not finite: 1." in html
    facts = json.loads((training_run.path / "report.json").read_text())
    assert facts["training"]["last"]["bits_per_byte/docs"] == pytest.approx(
        1.4 + 2 * 2.718**-3.33, abs=0.01
    )


def test_hostile_names_are_text(tmp_path):
    """Catches markup, mathematics, paths or terminal markup that a name could inject."""
    arms = (made_up_arm("dense", 1000, None, 32.0), made_up_arm(HOSTILE, 500, 0.1, 4.0))
    study = dataclasses.replace(
        made_up_study(arms),
        verdicts=(Verdict(HOSTILE, True, HOSTILE),),
        protocol={HOSTILE: HOSTILE},
        baselines={HOSTILE: {"docs": 1.0}},
    )
    run = made_up_run(tmp_path / "run", study, made_up_ledger([HOSTILE], layers=2, experts=2))
    html = build_report(run).read_text()
    assert "<script" not in html and "alert(&#x27;x&#x27;)" in html
    assert {path.parent for path in run.path.rglob("*.png")} == {run.plots}


def test_hostile_names_are_text_on_the_terminal_too(tmp_path):
    """Catches a name whose brackets the terminal takes for colours, in a row or in a sentence."""
    arms = (made_up_arm("dense", 1000, None, 32.0), made_up_arm("[dim]a", 500, 0.1, 4.0))
    console = Console(record=True, width=100, file=io.StringIO())
    print_summary(made_up_study(arms), console, report=tmp_path / "[red]" / "report.html")
    text = console.export_text()
    assert text.count("[dim]a") == 2 and "[red]" in text


def test_arms_with_like_names_keep_their_own_figures(tmp_path):
    """Catches two arms of which one figure overwrites the other."""
    names = ["a/b", "a b"]
    arms = (made_up_arm("dense", 1000, None, 32.0), *(made_up_arm(n, 5, 0.1, 4.0) for n in names))
    study = dataclasses.replace(made_up_study(arms), specialisation=None)
    run = made_up_run(tmp_path / "run", study, made_up_ledger(names, layers=2, experts=2))
    build_report(run)
    assert len(list(run.plots.glob("experts-*.png"))) == 2


def test_a_run_without_results_still_has_a_page(tmp_path):
    """Catches a report that fails exactly when a run failed."""
    run = RunFolder.create(tmp_path / "run", "compress", "", ["moejax"])
    run.finish("failed", error="DataError: no text.")
    html = build_report(run.path).read_text()
    assert "This run failed: DataError: no text." in html


def test_drawing_again_gives_the_same_page(training_run):
    """Catches a report that depends on anything but its run folder."""
    before = training_run.report_path.read_text()
    assert build_report(training_run.path).read_text() == before


def test_damaged_results_are_a_run_error(tmp_path, study_run):
    """Catches a KeyError out of the depths of a report."""
    run = RunFolder.create(tmp_path / "run", "compress", "", ["moejax"])
    data = json.loads(study_run.results_path.read_text())
    del data["arms"][1]["average"]["tokens"]
    run.results_path.write_text(json.dumps(data))
    with pytest.raises(RunError, match=r"arms\[1\].average"):
        build_report(run)


def test_comparison_has_all_runs_and_says_where_protocols_differ(tmp_path, study_run):
    """Catches runs of different texts set side by side in silence."""
    other = dataclasses.replace(
        made_up_study(), protocol={**made_up_study().protocol, "window": 64}
    )
    second = made_up_run(tmp_path / "b" / "study", other)
    page = compare_reports([study_run.path, second.path, second.path], tmp_path / "out")
    html = page.read_text()
    assert "2 runs side by side" in html and "b/study" in html
    assert "differ in window" in html
    assert html.count(">GPTQ 3 bit<") == 2
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["protocol_differences"] == ["window"]
    assert (tmp_path / "out" / "plots" / "frontier.png").exists()
    with pytest.raises(RunError, match="--out"):
        compare_reports([study_run.path], second.path)


def test_the_summary_says_gain_loss_and_place(study_run):
    """Catches last lines without the numbers one ran the study for."""
    console = Console(record=True, width=80, file=io.StringIO())
    print_summary(made_up_study(), console, report=study_run.report_path)
    text = console.export_text()
    for number in ("3.54 MB", "7.15×", "+0.0467", "+12.7 %", "95.33 %", "report.html"):
        assert number in text
