"""What every floor stands on: errors, specs, taps, axis names, random keys, moving JAX APIs."""

from moejax.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MoejaxError,
    RunError,
    SpecError,
)
from moejax.core.spec import check_that, from_json, spec, to_json
from moejax.core.taps import Taps

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MoejaxError",
    "RunError",
    "SpecError",
    "Taps",
    "check_that",
    "from_json",
    "spec",
    "to_json",
]
