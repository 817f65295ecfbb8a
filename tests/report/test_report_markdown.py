"""The report as Markdown."""

from moejax.report.markdown import study_markdown
from moejax.runs import ArmResult, DomainScore, StudyResult, Verdict


def test_markdown_holds_arms_verdicts_and_protocol():
    """Catches a pipe in a name that breaks the table, and a verdict whose failure is not shown."""
    score = DomainScore("docs", 10, 40, 20.0, 0.72, 7.4, 0.1, 0.9, 0.05, 0.01)
    base = ArmResult("base", None, (), 16, 16, 2000, 1500, 1000, (score,), score, 1.0)
    arm = ArmResult("a | b", "base", ("P()",), 4, 4.25, 800, 300, 1000, (score,), score, 1.0)
    study = StudyResult(
        {"study": "Toy", "seed": 0}, (base, arm), verdicts=(Verdict("v", False, "0.9"),)
    )
    facts = {"command": ["moejax", "run", "toy"], "git": {"commit": "abc"}}
    text = study_markdown(study, facts, [{"file": "plots/a.png", "caption": "Quality."}])
    assert text.startswith("# Toy\n") and "`moejax run toy`; commit: abc" in text
    assert "a \\| b" in text and "**not held**: v: 0.9" in text and "| seed | 0 |" in text
    assert "Quality.\n\n![](plots/a.png)" in text
    widths = {
        line.count("|") - line.count("\\|") for line in text.splitlines() if "bits/code" in line
    }
    assert len(widths) == 1 and "Hover" not in text
