"""Where config files lie: the folder of the file, the working folder, what ships with moejax."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from moejax.config.errors import nearest
from moejax.core.errors import ConfigError, DataError
from moejax.files import find_resource


def find_config(name: str | Path) -> Path:
    """The file that `moejax run NAME` means, with or without .gin.

    Looks in the working folder, then in what ships with moejax. ConfigError when none is there.
    """
    path = Path(name).expanduser()
    for candidate in _spellings(path):
        if candidate.is_file():
            return candidate
    hint = ""
    if not path.is_absolute() and ".." not in path.parts:
        found, hint = _shipped(str(name))
        if found is not None:
            return found
    raise ConfigError(
        f"{name} is a folder, not a config." if path.is_dir() else f"{name}: no such config.",
        _nearby(path.name, path if path.is_dir() else path.parent)
        or hint
        or "Name a .gin file; `moejax systems` lists those that ship with moejax.",
    )


def find_include(name: str, including: Path) -> Path:
    """The file that `include 'NAME'` in the file `including` means.

    Looks beside that file, in the configs folder that holds it, in the working folder and in what
    ships with moejax. ConfigError when none has it, or when NAME leaves its folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name:
        raise ConfigError(
            f"include {name!r} leaves the configs folder.",
            "Name the file relative to configs/ or to this file, such as 'models/nano.gin'.",
        )
    roots = [including.resolve().parent]
    roots += [folder for folder in roots[0].parents if folder.name == "configs"][:1]
    for root in roots:
        for candidate in _spellings(root / path):
            if candidate.is_file():
                return candidate
    found, hint = _shipped(name)
    if found is not None:
        return found
    raise ConfigError(f"include {name!r}: no such file.", _nearby(path.name, roots[0]) or hint)


def shown(path: Path) -> str:
    """The path as the reader knows it: from the working folder, or from configs/."""
    path = path.absolute()
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    if "configs" in path.parts:
        last = len(path.parts) - 1 - path.parts[::-1].index("configs")
        return str(Path(*path.parts[last:]))
    return str(path)


def _spellings(path: Path) -> list[Path]:
    return [path] if path.suffix == ".gin" else [path, Path(f"{path}.gin")]


def _shipped(name: str) -> tuple[Path | None, str]:
    """The shipped file, or the hint of what has a near name."""
    hint = ""
    for spelling in dict.fromkeys((name.removesuffix(".gin") + ".gin", name)):
        try:
            found = find_resource("configs", spelling)
        except DataError as error:
            hint = hint or error.fix
            continue
        if found.is_file():
            return found, ""
    return None, hint


def _nearby(name: str, folder: Path) -> str:
    """The configs of `folder` with names near to `name`, as one line of mend; empty without any."""
    try:
        there = sorted(p.name for p in folder.iterdir() if p.suffix == ".gin")
    except OSError:
        return ""
    near = nearest(name.removesuffix(".gin") + ".gin", there)
    if near:
        return f"Did you mean {near}?"
    return f"{shown(folder)} holds {', '.join(there[:5])}." if there else ""
