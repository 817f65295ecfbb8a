"""Errors: a problem and its mend."""

import copy

from moejax.core import CheckpointError, ConfigError, DataError, MoejaxError, RunError, SpecError


def test_an_error_prints_its_problem_and_its_fix_on_two_lines():
    """Catches an error that hides the fix, or prints a tuple."""
    assert str(RunError("it broke.", "Mend it.")) == "it broke.\n  Mend it."
    assert str(RunError("it broke.")) == "it broke."


def test_every_error_is_one_the_cli_catches():
    """Catches an error class outside the family, which would print a traceback."""
    for kind in (CheckpointError, ConfigError, DataError, RunError, SpecError):
        assert issubclass(kind, MoejaxError)


def test_errors_survive_a_copy():
    """Catches errors whose constructor cannot be called again, as a worker pool does with them."""
    error = copy.copy(SpecError("no bits.", "Give bits.", field="bits"))
    assert (error.problem, error.fix, error.field) == ("no bits.", "Give bits.", "bits")
