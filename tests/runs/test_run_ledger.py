"""Ledger rows and study results: exact round trips, no silent loss."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core import RunError
from moejax.runs import ArmResult, DomainScore, Ledger, LedgerRow, StudyResult, Verdict

NUMBERS = st.floats(allow_nan=False)
ROWS = st.builds(
    LedgerRow,
    arm=st.text(max_size=6),
    pass_name=st.text(max_size=6),
    layer=st.integers(-1, 9),
    expert=st.none() | st.integers(0, 9),
    matrix=st.sampled_from(["gate", "up", "down"]),
    tokens=st.none() | st.integers(0, 10**12),
    gate_mass=st.none() | NUMBERS,
    code_bits=st.none() | NUMBERS,
    stored_bytes=st.none() | st.integers(0, 2**50),
    relative_error=st.none() | NUMBERS,
    fallback=st.none() | st.text(max_size=6),
    dead=st.booleans(),
    calibrated=st.booleans(),
    lineage=st.lists(st.text(max_size=4), max_size=2).map(tuple),
)


@given(rows=st.lists(ROWS, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_ledger_comes_back_exactly(tmp_path_factory, rows):
    """Catches line separators inside names, infinities, big integers and lost digits."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger()
    ledger.add(rows)
    ledger.save(path)
    assert Ledger.load(path).rows == rows


def test_the_last_row_of_a_matrix_counts():
    """Catches a summary that shows the state after the first pass of two."""
    first = LedgerRow("a", "drop", 0, 1, "up", code_bits=16.0)
    second = dataclasses.replace(first, pass_name="gptq", code_bits=3.0)
    other = dataclasses.replace(first, arm="b")
    ledger = Ledger([first, other, second])
    assert ledger.last("a") == {(0, 1, "up"): second}
    assert ledger.arms() == ("a", "b")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"arm": "a"}',
        '{"arm": "a", "pass_name": "p", "layer": "0", "expert": null, "matrix": "up"}',
        '{"arm": "a", "pass_name": "p", "layer": 0, "expert": 1.5, "matrix": "up"}',
        '{"arm": "a", "pass_name": "p", "layer": 0, "expert": 1, "matrix": "up", "new": 1}',
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    """Catches a reader that guesses, or that drops fields of another version."""
    path = tmp_path / "ledger.jsonl"
    Ledger([LedgerRow("a", "p", 0, 0, "up")]).save(path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match="line 2"):
        Ledger.load(path)


def score(**changes) -> DomainScore:
    plain = DomainScore("docs", 10, 40, 27.5, 0.99, 15.6, 0.1, 0.9, 0.02, 0.001, 100.0)
    return dataclasses.replace(plain, **changes)


def study(**changes) -> StudyResult:
    arm = ArmResult("a", None, ("p",), 3.0, 3.25, 10, 8, 5, (score(),), score(group="average"), 1.0)
    plain = StudyResult(
        protocol={"seeds": [0, 1], "dtype": "float32"},
        arms=(arm,),
        baselines={"xz -9e": {"docs": 1.95}},
        verdicts=(Verdict("v", True, "d"),),
        specialisation=(None, ((0.25, 0.75), (0.5, 0.5))),
    )
    return dataclasses.replace(plain, **changes)


def test_a_study_comes_back_exactly(tmp_path):
    """Catches fields lost on the way, lists for tuples, None turned into numbers."""
    path = tmp_path / "results.json"
    study().save(path)
    assert StudyResult.load(path) == study()


def test_a_ruined_arm_can_be_written(tmp_path):
    """Catches a study of hours that dies on saving because one arm's perplexity is infinite."""
    arm = dataclasses.replace(
        study().arms[0],
        average=score(perplexity=math.inf, nll_sum=math.nan, kl=None, delta_stderr=None),
    )
    path = tmp_path / "results.json"
    study(arms=(arm,)).save(path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = StudyResult.load(path).arms[0].average
    assert found.perplexity == math.inf and math.isnan(found.nll_sum) and found.kl is None


def test_array_scalars_are_numbers(tmp_path):
    """Catches results that only plain Python numbers can enter."""
    shares = np.full((1, 2, 4), 0.25)
    arm = dataclasses.replace(study().arms[0], stored_bytes=np.int64(12), code_bits=np.float32(2.5))
    path = tmp_path / "results.json"
    study(arms=(arm,), specialisation=shares).save(path)
    found = StudyResult.load(path)
    assert found.arms[0].stored_bytes == 12 and found.arms[0].code_bits == 2.5
    assert found.specialisation == (((0.25,) * 4,) * 2,)


def test_what_could_not_be_read_is_not_written(tmp_path):
    """Catches a results.json that its own reader refuses."""
    arm = dataclasses.replace(study().arms[0], stored_bytes=1.5)
    path = tmp_path / "results.json"
    with pytest.raises(RunError, match="stored_bytes"):
        study(arms=(arm,)).save(path)
    assert not path.exists()
