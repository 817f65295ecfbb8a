"""From a gin file to a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax.config.errors import located
from moejax.config.expand import expanded_text
from moejax.config.inject import Injection, check_all_used
from moejax.config.reader import Bindings
from moejax.config.registry import jobs, lookup
from moejax.config.search import find_config, shown
from moejax.config.values import Location, Origin
from moejax.core.errors import ConfigError, MoejaxError, SpecError
from moejax.runs import config_hash

_NONE: Mapping[str, Sequence[str]] = {}


@dataclass(frozen=True)
class Config:
    """A parsed config: the job it describes and the text that describes it completely.

    text: every value of the job, defaults included; a config of its own.
    """

    file: Path
    text: str
    built: Any
    bindings: Bindings

    def job(self) -> Any:
        """The object bound to `run.job`: it has `run(folder)` and `plan()`."""
        return self.built

    @property
    def hash(self) -> str:
        """SHA-256 of `text`, the name by which a run folder knows its run again."""
        return config_hash(self.text)

    @property
    def where(self) -> dict[tuple[str, str, str], Location]:
        """(scope, complete selector, parameter) -> the file and line that bound it."""
        return {
            (*key, name): bound.where
            for key, arguments in self.bindings.by_key.items()
            for name, bound in arguments.items()
        }

    def explain(self, error: MoejaxError) -> MoejaxError:
        """A SpecError that only showed while the job ran, with the line that bound its field.

        Any other error, and one whose line is not clear, comes back as it is.
        """
        line = self.bindings.line_of(error) if isinstance(error, SpecError) else None
        return located(error, line) if line else error


def load_config(
    file: str | Path, bindings: Sequence[str] = (), stand_in: Mapping[str, Sequence[str]] = _NONE
) -> Config:
    """Reads a gin file, then `bindings` such as "GPTQ.bits=3", and builds the job.

    file: looked for in the working folder, then among the configs that ship with moejax; `.gin` may
    be left out. stand_in: a name -> bindings that give a config with such a name, and without a
    job, its job. Raises ConfigError, naming file and line, for everything that is wrong with it.
    """
    path = find_config(file)
    read = Bindings()
    read.read_file(path, Origin.FILE)
    for binding in bindings:
        read.read_binding(binding)
    top = Location(shown(path))
    root = lookup("run")
    for name, more in stand_in.items():
        if ("", root.selector) not in read.by_key and ("", lookup(name).selector) in read.by_key:
            for binding in more:
                read.read_binding(binding)
    bound = read.by_key.get(("", root.selector), {}).get("job")
    if bound is None:
        raise ConfigError(
            f"{top} binds no run.job.",
            f"Add run.job = @Job(), where Job is one of {', '.join(jobs())}; "
            "or is this a part that other configs include?",
        )
    injection = Injection(read)
    job = injection.build(root, (), top)
    if not (callable(getattr(job, "run", None)) and callable(getattr(job, "plan", None))):
        raise ConfigError(
            f"{bound.where}: run.job is {job!r}, which is no job.",
            f"Bind one of {', '.join(jobs())}, such as run.job = @Compress().",
        )
    check_all_used(read, injection)
    return Config(path, expanded_text(injection, read.modules), job, read)
