"""Every wrong config: the file, the line, what is wrong, what to write instead."""

from __future__ import annotations

import pytest

from moejax.config import load_config
from moejax.core.errors import ConfigError
from tests.config.conftest import TOY


def error_of(name: str = "toy", *bindings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(name, bindings)
    problem, fix = str(caught.value).split("\n  ")
    assert fix.strip()
    assert "\n" not in problem
    return f"{problem} | {fix}"


# what is added to toy.gin (from line 9) -> what the error says, in order
WRONG = {
    "ToyGrd.bits = 3": ["toy.gin, line 9: nothing is named ToyGrd.", "Did you mean ToyGrid"],
    "toygrid.bits = 3": ["line 9: nothing is named toygrid.", "Did you mean ToyGrid"],
    "ToyGrid.bit = 3": ["line 9: ToyGrid has no parameter 'bit'.", "Did you mean bits?"],
    "ToyGrid.xyz = 3": ["ToyGrid has no parameter 'xyz'.", "takes bits, group, clip, shape."],
    "ToyJob.name = @ToyGrd()": ["line 9: nothing is named ToyGrd.", "Did you mean ToyGrid"],
    "ToyJob.name = 3": ["line 9: ToyJob.name = 3 has type int, expected str.", "Give"],
    "ToyJob.budget = @ToyGrid()": ["line 9: ToyJob.budget = ToyGrid(", "expected", "Program"],
    "experts/ToyGrid.bits = 2.5": ["line 9: ToyGrid.bits = 2.5 has type float", "int |"],
    "bits = 'three'": ["line 9: ToyGrid.bits = 'three' has type str"],
    "experts/ToyProgram.average_bits = 4.5": [
        "toy.gin, line 9: ToyProgram.average_bits = 4.5 is impossible.",
        "Choose a value from 1 to 3.",
    ],
    "ToyProgram.choices = (1, 'a')": ["line 9: ToyProgram.choices[1] = 'a' has type str"],
    "ToyJob.recipe = (@experts/ToyGrid())": [
        "line 9: ToyJob.recipe = ToyGrid(",
        "one item needs a comma",
    ],
    "ToyJob.recipe = (@ToyGrid, @ToyGrid)": [
        "line 9: @ToyGrid is the name of ToyGrid, not an object.",
        "Write @ToyGrid().",
    ],
    "experts/ToyGrid.bits = %bots": ["line 9: %bots has no value.", "Add a line bots ="],
    "bits = %bits": ["line 9: %bits is part of itself."],
    "experts/ToyGrid.bits = %gin.REQUIRED": [
        "line 9: ToyGrid is built without bits (int | ToyProgram).",
        "Add a line experts/ToyGrid.bits =",
    ],
    "ToyJob.budget = @other/ToyProgram()": [
        "line 9: ToyProgram is built without average_bits (float).",
        "Add a line other/ToyProgram.average_bits = ...",
    ],
    "run.job = @experts/ToyGrid()": ["line 9: run.job is ToyGrid(", "no job", "Bind one of"],
    "other/ToyGrid.bits = 3": [
        "line 9: other/ToyGrid.bits has no effect.",
        "builds attention/ToyGrid, experts/ToyGrid",
    ],
    "ToySilent:\n    x = 3": ["line 10: ToySilent has no parameter 'x'.", "takes no parameters"],
    "repeat.times = 3": ["line 9: repeat.times has no effect: this config builds no repeat."],
    "average_bits = 3": ["line 9: average_bits is never used.", "%bits"],
    "ToyGrid.bits": ["line 9: 'ToyGrid.bits' cannot be read", "Write Name.parameter = value"],
    "ToyGrid.bits = three": ["line 9: three is no value.", "Text needs quotes ('three')"],
    "ToyGrid.bits = true": ["line 9: true is no value.", "Write True."],
    "ToyGrid.bits = (3,": ["toy.gin, line", "EOF in multi-line", "Close the bracket"],
    "ToyGrid.bits = 'a": ["toy.gin, line 9", "cannot be read"],
    "ToyGrid.bits =": ["toy.gin, line 9", "cannot be read"],
    "  ToyGrid. bits = 3": ["toy.gin, line 9", "cannot be read"],
    "import no_such_lab.passes": ["line 9: module no_such_lab.passes cannot", "PYTHONPATH"],
    "from tests.config import toy_specs": ["line 9:", "is not understood", "Write import"],
    "include 'toy.gin'": ["toy.gin includes itself"],
    "include '../toy.gin'": ["line 9: include '../toy.gin' leaves the configs folder."],
    "include '/toy.gin'": ["line 9: include '/toy.gin' leaves the configs folder."],
    "include 'toyy.gin'": ["line 9: include 'toyy.gin': no such file.", "Did you mean toy.gin?"],
    "include 3": ["line 9", "cannot be read: Expected file path"],
    "ToyJob.recipe = @ToyJob()": ["line 9: ToyJob is part of itself."],
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_named_and_mended(folder, line):
    """Catches errors without file and line, on the wrong line, or without a mend."""
    (folder / "toy.gin").write_text(TOY + line + "\n")
    message = error_of()
    place = 0
    for part in WRONG[line]:
        assert part in message[place:], message
        place = message.index(part, place)


@pytest.mark.parametrize(
    ("binding", "parts"),
    [
        ("ToyGrid.bit=3", ["--set ToyGrid.bit=3: ToyGrid has no parameter 'bit'.", "bits"]),
        ("ToyGrd.bits=3", ["--set ToyGrd.bits=3: nothing is named ToyGrd."]),
        ("experts/ToyGrid.bits='a'", ["--set experts/ToyGrid.bits='a': ToyGrid.bits = 'a' has"]),
        ("ToyJob.name=abc", ["--set ToyJob.name=abc: abc is no value.", "'abc'"]),
        ("ToyGrid.bits=3", ["ToyGrid.bits is overridden everywhere.", "attention/ToyGrid, exp"]),
        ("spare=3", ["--set spare=3: spare is never used.", "%bits"]),
        ("bits", ["--set bits is no binding."]),
        ("", ["is no binding."]),
        ("include 'toy.gin'", ["is no binding."]),
        ("bits=3\nToyJob.name='a'", ["is no binding"]),
    ],
)
def test_a_wrong_set_is_named_and_mended(folder, binding, parts):
    """Catches --set errors that name no binding, and ones that silently do nothing."""
    with pytest.raises(ConfigError) as caught:
        load_config("toy", [binding])
    assert caught.value.fix
    for part in parts:
        assert part in str(caught.value)


def test_an_overridden_value_in_the_file_is_no_error(folder):
    """Catches a refusal of common values that every scope happens to override."""
    (folder / "toy.gin").write_text(TOY + "ToyGrid.bits = 8\n")
    assert load_config("toy").job().recipe[0].bits == 3


def test_a_set_may_leave_parts_of_the_file_unused(folder):
    """Catches a --set of other objects that is refused for what the file says of the old ones."""
    assert len(load_config("toy", ["ToyJob.recipe=[@experts/ToyGrid()]"]).job().recipe) == 1
    assert load_config("toy", ["ToyJob.recipe=()"]).job().recipe == ()
    (folder / "toy.gin").write_text(TOY + "other/ToyGrid.bits = 3\n")
    assert "line 9: other/ToyGrid.bits has no effect" in error_of("toy", "bits=2")


def test_unused_values_of_an_include_are_no_error(folder):
    """Catches shared files that must serve exactly one job, and errors that blame the top file."""
    (folder / "base.gin").write_text("spare = 1\nother/ToyGrid.bits = 3\n")
    (folder / "toy.gin").write_text("include 'base.gin'\n" + TOY)
    load_config("toy")
    (folder / "base.gin").write_text("\nother/ToyGrid.bit = 3\n")
    assert error_of().startswith("base.gin, line 2: ToyGrid has no parameter 'bit'.")
    (folder / "base.gin").write_text("experts/ToyProgram.choices = (7, 8)\n")
    assert error_of().startswith("toy.gin, line 9: ToyProgram.average_bits = 2.5")


def test_a_missing_file_lists_near_names(folder):
    """Catches a bare FileNotFoundError."""
    assert error_of("tpy") == "tpy: no such config. | Did you mean toy.gin?"
    assert "holds toy.gin" in error_of("./zzz")
    (folder / "sub").mkdir()
    assert error_of("sub").startswith("sub is a folder, not a config.")
    assert "moejax systems" in error_of(str(folder / "sub" / "x"))


def test_a_file_that_is_no_text(folder):
    """Catches a decoding error that reaches the user as a traceback."""
    (folder / "toy.gin").write_bytes(b"\xff\xfe\x00")
    assert error_of().startswith("toy.gin cannot be read:")


def test_a_file_without_a_job(folder):
    """Catches a file meant to be included that is run and ends in a TypeError."""
    (folder / "part.gin").write_text("import tests.config.toy_specs\nToyGrid.bits = 3\n")
    assert error_of("part").startswith("part.gin binds no run.job. | Add run.job = @Job()")


def test_a_job_that_finds_fault_with_a_part_names_the_line_of_the_part(folder):
    """Catches the job's own field blamed for that of one of its parts."""
    (folder / "toy.gin").write_text(TOY + "ToyJob.clip = 2.0\nexperts/ToyGrid.clip = -1.0\n")
    assert error_of().startswith("toy.gin, line 10: ToyGrid.clip = -1.0 is impossible.")
