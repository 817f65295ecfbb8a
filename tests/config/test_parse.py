"""From a gin file to a job: values, scopes, includes, --set, the expanded text."""

from __future__ import annotations

import threading
from pathlib import Path

import gin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import builders, load_config
from moejax.config.values import REQUIRED, Macro, written
from moejax.core.errors import ConfigError, SpecError
from tests.config import toy_specs
from tests.config.conftest import TOY
from tests.config.toy_specs import ToyGrid, ToyJob, ToyProgram


def job_of(text: str, *bindings: str, file: str = "case.gin") -> ToyJob:
    Path(file).write_text("import tests.config.toy_specs\n" + text, encoding="utf-8")
    return load_config(file, bindings).job()


def test_scopes_and_macros_reach_the_right_object(folder):
    """Catches a scope's binding given to another scope, or an outer one not inherited."""
    job = load_config("toy").job()
    attention, experts = job.recipe
    assert attention == ToyGrid(bits=3, group=64)
    assert experts == ToyGrid(bits=ToyProgram(average_bits=2.5), group=64)


@pytest.mark.parametrize(
    "text",
    [
        TOY,
        # a macro's reference is built in the scope of the macro's name
        "run.job = @a/ToyJob()\na/ToyJob.recipe = (%left, %right)\nleft = @ToyGrid()\n"
        "right = @ToyGrid()\nleft/ToyGrid.bits = 2\nToyGrid.group = 8\n",
        # nested scopes: a reference with a scope replaces the scope, one without keeps it
        "run.job = @a/b/ToyJob()\nToyJob.recipe = (@ToyGrid(), @c/ToyGrid(), @a/ToyGrid())\n"
        "a/ToyGrid.bits = 2\na/b/ToyGrid.group = 16\nc/ToyGrid.bits = 7\n",
        # a macro in a macro, and one that only its prefix defines
        "run.job = @ToyJob()\nToyJob.recipe = (@ToyGrid(),)\nToyGrid.bits = %m/n\nm = %other\n"
        "other = 5\n",
        # a block, and a later binding that replaces an earlier one
        "run.job = @ToyJob()\nToyJob:\n    name = 'a'\n    recipe = (@ToyGrid(),)\n"
        "ToyJob.name = 'b'\n",
    ],
    ids=["toy", "macro scope", "nested scopes", "macro of macro", "block"],
)
def test_gin_itself_builds_the_same_job(folder, text):
    """Catches rules of scope, macro or precedence that differ from gin's own."""
    text = text.replace("import tests.config.toy_specs\n", "")
    ours = job_of(text)
    gin.clear_config()
    for name in ("ToyProgram", "ToySilent", "ToyGrid", "ToyJob"):
        gin.external_configurable(getattr(toy_specs, name), module="toy")
    root = gin.external_configurable(builders.run, module="toy")
    try:
        gin.parse_config(text)
        assert root() == ours
    finally:
        gin.clear_config()


def test_set_wins_over_the_file_and_the_last_set_wins(folder):
    """Catches --set applied before the file, or the first of two kept."""
    job = load_config("toy", ["ToyJob.name='a'", "ToyJob.name='b'", "bits=2"]).job()
    assert job.name == "b"
    assert job.recipe[0].bits == 2


def test_lists_are_tuples(folder):
    """Catches lists that reach a spec, which must be hashable."""
    job = job_of(
        "run.job = @ToyJob()\nToyJob.recipe = [@ToyGrid()]\nToyGrid.bits = @ToyProgram()\n"
        "ToyProgram.average_bits = 3\nToyProgram.choices = [3, 4]"
    )
    assert job.recipe == (ToyGrid(bits=ToyProgram(average_bits=3.0, choices=(3, 4))),)
    hash(job)


def test_repeat_and_concatenate(folder):
    """Catches parts nested instead of joined, and a wrong count."""
    job = job_of(
        "run.job = @ToyJob()\nToyJob.recipe = @concatenate()\n"
        "concatenate.parts = (@low/repeat(), @last/ToyGrid())\n"
        "low/repeat.item = @ToyGrid()\nlow/repeat.times = 2\n"
        "low/ToyGrid.bits = 2\nlast/ToyGrid.bits = 8\n"
    )
    assert [grid.bits for grid in job.recipe] == [2, 2, 8]


@pytest.mark.parametrize("times", [-1, 1.5, True])
def test_repeat_refuses_a_strange_count(folder, times):
    """Catches a negative or fractional count that silently gives an empty tuple."""
    with pytest.raises(ConfigError, match=r"line 5: repeat\.times") as caught:
        job_of(
            "run.job = @ToyJob()\nToyJob.recipe = @repeat()\nrepeat.item = @ToyGrid()\n"
            f"repeat.times = {times}"
        )
    assert "whole number" in caught.value.fix


def test_includes_are_found_beside_the_file_in_its_configs_and_in_the_working_folder(
    folder, monkeypatch
):
    """Catches includes that only resolve from one working folder, and a wrong order of places."""
    configs = folder / "lab" / "configs"
    (configs / "compress").mkdir(parents=True)
    (configs / "models").mkdir()
    (configs / "compress" / "beside.gin").write_text("ToyGrid.bits = 2\n")
    (configs / "beside.gin").write_text("ToyGrid.bits = 7\n")
    (configs / "models" / "rooted.gin").write_text("ToyGrid.group = 16\n")
    (folder / "here.gin").write_text("ToyGrid.clip = 3.0\n")
    top = configs / "compress" / "top.gin"
    top.write_text(
        "import tests.config.toy_specs\ninclude 'beside.gin'\ninclude 'models/rooted.gin'\n"
        "include 'here'\nrun.job = @ToyJob()\nToyJob.recipe = (@ToyGrid(),)\n"
    )
    assert load_config(top).job().recipe == (ToyGrid(bits=2, group=16, clip=3.0),)


def test_a_config_is_found_with_and_without_gin_and_below_configs(folder):
    """Catches a search that wants the exact path."""
    (folder / "configs" / "sub").mkdir(parents=True)
    (folder / "configs" / "sub" / "toy2.v1.gin").write_text(TOY)
    names = ["toy.gin", "toy", "sub/toy2.v1", "configs/sub/toy2.v1.gin", str(folder / "toy")]
    assert len({load_config(name).hash for name in names}) == 1


def test_the_expanded_text_alone_builds_the_same_job(folder):
    """Catches values, defaults or scopes that are lost on the way to config.gin."""
    (folder / "base.gin").write_text("ToyGrid.group = 16\nToyJob.name = 'a\\n\"b\"'\nunused = 1\n")
    (folder / "toy.gin").write_text(TOY.replace("bits = 3", "include 'base.gin'\nbits = 3"))
    first = load_config("toy", ["ToyJob.clip=-1e999"])
    (folder / "base.gin").unlink()
    (folder / "toy.gin").unlink()
    (folder / "text.gin").write_text(first.text)
    second = load_config("text")
    assert second.job() == first.job()
    assert second.text == first.text
    assert second.hash == first.hash


def test_the_expanded_text_holds_defaults_and_nothing_unused(folder):
    """Catches a config.gin that a changed default, or an unused include, would change."""
    (folder / "base.gin").write_text("ToyProgram.choices = (1, 2, 3)\nspare/ToyGrid.bits = 9\n")
    (folder / "toy.gin").write_text("include 'base.gin'\n" + TOY)
    text = load_config("toy").text
    assert "ToyJob.budget = @ToyJob_budget/ToyProgram()" in text
    assert "ToyJob_budget/ToyProgram.average_bits = 2.5" in text
    assert "experts/ToyProgram.choices = (1, 2, 3)" in text
    assert "attention/ToyGrid.clip = 1e999" in text
    assert "spare" not in text
    assert text.startswith("import tests.config.toy_specs\n")


def test_the_text_does_not_depend_on_how_the_job_was_written(folder):
    """Catches a hash that changes with comments, the order of lines or what is spelled out."""
    lines = TOY.splitlines()
    spelled = [*lines[:1], *reversed(lines[1:]), "# a comment", "ToyJob.name = 'toy'"]
    (folder / "other.gin").write_text("\n".join(spelled))
    assert load_config("other").text == load_config("toy").text
    three, exact = "experts/ToyProgram.average_bits=3", "experts/ToyProgram.average_bits=3.0"
    assert load_config("toy", [three]).text == load_config("toy", [exact]).text
    assert load_config("other", ["bits=2"]).hash != load_config("toy").hash


def test_parses_do_not_leak_into_each_other(folder):
    """Catches bindings kept from an earlier parse, and parses that share state across threads."""
    first = load_config("toy", ["ToyGrid.group=16"])
    jobs = {}
    threads = [
        threading.Thread(target=lambda n=n: jobs.update({n: load_config("toy", [f"bits={n}"])}))
        for n in range(2, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: config.job().recipe[0].bits for n, config in jobs.items()} == {
        n: n for n in range(2, 8)
    }
    assert load_config("toy").job().recipe[0].group == 64
    assert first.job().recipe[0].group == 16


def test_an_error_at_run_time_gets_its_line(folder):
    """Catches a spec that only fails against its model and then does not say where it was bound."""
    config = load_config("toy")
    error = SpecError("ToyGrid.group = 64 does not divide 96.", "Use 32.", field="group")
    explained = config.explain(error)
    assert str(explained) == "toy.gin, line 5: ToyGrid.group = 64 does not divide 96.\n  Use 32."
    told_by_value = SpecError("ToyGrid.bits = %s is odd.", "Use 4.", field="bits")
    assert config.explain(told_by_value) is told_by_value
    (folder / "toy.gin").write_text(TOY.replace("= %bits", "= 7").replace("bits = 3\n", "\n"))
    told_by_value = SpecError("ToyGrid.bits = 7 is odd.", "Use 4.", field="bits")
    assert str(load_config("toy").explain(told_by_value)).startswith("toy.gin, line 6: ToyGrid")
    unbound = SpecError("ToyGrid.clip = 3 is odd.", "Use 4.", field="clip")
    assert config.explain(unbound) is unbound


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(literals)
def test_what_is_written_reads_back(value):
    """Catches literals that gin reads as something else: (1,), infinity, quotes, minus."""
    assert repr(gin.config.parse_value(written(value))) == repr(value)


def test_what_gin_cannot_write_is_refused():
    """Catches objects written as their repr, and nan, for which gin has no literal."""
    assert written((Macro(("a", "b")), REQUIRED)) == "(%a/b, %gin.REQUIRED)"
    for value in (object(), float("nan"), (1, {2})):
        with pytest.raises(ValueError, match="cannot write"):
            written(value)
