"""Model folders between Hugging Face's layout and moejax's, in either direction."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax import weights
from moejax.checkpoint import (
    copy_beside,
    export_model,
    families,
    import_model,
    load_model,
    read_manifest,
    save_model,
)
from moejax.checkpoint.importing import CONFIG
from moejax.checkpoint.manifest import MANIFEST
from moejax.core import CheckpointError, ConfigError
from moejax.data import folder_tokenizer, shipped_tokenizer, write_folder_tokenizer
from moejax.files import content_hash, new_folder

COVERAGE = "coverage.tsv"


def convert(
    source: Path | str,
    target: Path | str,
    *,
    dtype: Any = None,
    grid: weights.Grid | None = None,
    family: str | None = None,
    shard_bytes: int | None = None,
) -> str:
    """Converts the folder `source` to the new folder `target`, and says what it did.

    A folder with config.json comes in: as a moejax folder with coverage.tsv, experts rounded to
    `grid` where one is given. A folder with model.json goes out, under the names of `family` or of
    the family it came from. dtype: of plain weights, None for what they are stored in.
    Raises CheckpointError as `import_model` and `export_model`, ConfigError for a `grid` that is no
    grid, RunError if `target` is there.
    """
    source = Path(source)
    if grid is not None and not isinstance(grid, weights.Grid):
        raise ConfigError(
            f"{grid!r} is no grid.", "Give one like SymmetricGrid(bits=4, group=128)."
        )
    if shard_bytes is not None and shard_bytes < 1:
        raise ConfigError(f"files of {shard_bytes} bytes hold no tensor.", "Try 5000000000.")
    if (source / MANIFEST).is_file():
        if grid is not None:
            raise CheckpointError(
                f"{source} is a moejax folder, which goes out as it is.",
                "Quantize it with a recipe of passes (moejax run), then convert the result.",
            )
        return _out(source, Path(target), dtype, family, shard_bytes)
    if (source / CONFIG).is_file():
        if family is not None or shard_bytes is not None:
            raise CheckpointError(
                f"{source} comes in: its own config says the family, and there is one file.",
                "Leave --family and --shard-bytes out.",
            )
        return _in(source, Path(target), dtype, grid)
    raise CheckpointError(
        f"{source} holds neither {CONFIG} (a Hugging Face folder) nor {MANIFEST} (moejax's).",
        "Give the folder of a model.",
    )


def _in(source: Path, target: Path, dtype: Any, grid: weights.Grid | None) -> str:
    with new_folder(target) as made:
        imported = import_model(source, dtype=dtype, grid=grid)
        facts: dict[str, Any] = {
            "family": imported.family.name,
            "config": dict(imported.config),
            "config_sha256": content_hash(dict(imported.config)),
        }
        if (source / "tokenizer.json").is_file():
            facts["tokenizer"] = folder_tokenizer(source).sha256
        save_model(made, imported.model, facts=facts)
        imported.coverage.write(made / COVERAGE)
        copy_beside(source, made)
    rows = imported.coverage.rows
    uses = [sum(row.use == use for row in rows) for use in ("used", "tied", "ignored")]
    return (
        f"{target}: {imported.family.name}, {len(imported.coverage.sources)} parameters from "
        f"{len(rows)} tensors ({uses[0]} used, {uses[1]} tied, {uses[2]} ignored); "
        f"the account is in {COVERAGE}"
    )


@contextlib.contextmanager
def _tokenizer_beside(source: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with the model's tokenizer: its own, but for models that use the one that ships."""
    shipped = shipped_tokenizer()
    if (source / "tokenizer.json").is_file() or facts.get("tokenizer") != shipped.sha256:
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        write_folder_tokenizer(folder, shipped)
        yield Path(folder)


def _out(
    source: Path, target: Path, dtype: Any, family: str | None, shard_bytes: int | None
) -> str:
    facts = read_manifest(source).facts
    name = family or facts.get("family")
    if name is not None and name not in families():
        raise CheckpointError(
            f"there is no family {name!r}.", f"moejax knows {', '.join(sorted(families()))}."
        )
    config = facts.get("config")
    more = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    with _tokenizer_beside(source, facts) as beside:
        export_model(
            target,
            load_model(source, dtype=None),
            family=None if name is None else families()[name],
            config=config if isinstance(config, dict) and name == facts.get("family") else None,
            dtype=None if dtype is None else np.dtype(dtype),
            beside=beside,
            **more,
        )
    return f"{target}: a folder that transformers loads"
