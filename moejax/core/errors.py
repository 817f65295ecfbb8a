"""Errors that tell the reader what to do: one line for what is wrong, one for the mend."""

from __future__ import annotations


class MoejaxError(Exception):
    """An error a user can mend. The CLI prints it without a traceback and exits with status 2.

    problem: what is wrong and where, with the field and its value.
    fix: what to do about it.
    """

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  {self.fix}" if self.fix else self.problem


class SpecError(MoejaxError):
    """A spec that describes nothing that can exist (top-k above the number of experts, ...)."""

    def __init__(self, problem: str, fix: str = "", *, field: str = ""):
        super().__init__(problem, fix)
        self.field = field


class ConfigError(MoejaxError):
    """A config file with an unknown name, a wrong type or a missing value."""


class DataError(MoejaxError):
    """A corpus, tokenizer or download that is missing, damaged or too small."""


class CheckpointError(MoejaxError):
    """A checkpoint that is missing, truncated, of another spec, or holds NaN."""


class RunError(MoejaxError):
    """A run folder that cannot be written or already holds another run."""
