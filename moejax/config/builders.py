"""What gin cannot write: the job to run, repeated items and joined tuples."""

from __future__ import annotations

from typing import Any

from moejax.core.errors import SpecError


def run(job: Any) -> Any:
    """The root of every config: `run.job = @Compress()`."""
    return job


def repeat(item: Any, times: int) -> tuple[Any, ...]:
    """`item`, `times` times: `ModelSpec.layers = @repeat()`. SpecError unless times >= 0.

    A tuple is a pattern: its items in order, `times` times.
    """
    if isinstance(times, bool) or not isinstance(times, int) or times < 0:
        raise SpecError(
            f"repeat.times = {times!r} is impossible.", "Give a whole number from 0.", field="times"
        )
    return (item if isinstance(item, tuple) else (item,)) * times


def concatenate(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """One tuple out of tuples and single items, in order: `(@dense/repeat(), @last/LayerSpec())`.

    Raises SpecError when `parts` is no tuple.
    """
    if not isinstance(parts, tuple):
        raise SpecError(
            f"concatenate.parts = {parts!r} is no tuple.",
            "Write the parts as (@a/repeat(), @b/repeat()).",
            field="parts",
        )
    joined: list[Any] = []
    for part in parts:
        joined.extend(part if isinstance(part, tuple) else (part,))
    return tuple(joined)
