"""What ships with moejax: configs and assets, in a checkout as in an installed package."""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath
from typing import Literal

from moejax.core.errors import DataError

_PACKAGE = Path(__file__).resolve().parent.parent


def find_resource(kind: Literal["configs", "assets"], relative: str) -> Path:
    """The file or folder `relative` below `kind`, from the first place that has it.

    Configs: the working folder (with and without `configs/`), then the checkout, then the installed
    package. Assets: the checkout, then the package. Raises DataError, with near names, if none has.
    """
    inside = PurePosixPath(relative)
    if inside.is_absolute() or ".." in inside.parts:
        raise DataError(
            f"{kind} resource {relative!r} leaves its folder.",
            f"Name it relative to {kind}/, without '..'.",
        )
    roots = _roots(kind)
    for root in roots:
        if (root / inside).exists():
            return root / inside
    known = sorted({str(p.relative_to(r)) for r in roots if r.name == kind for p in r.rglob("*.*")})
    near = difflib.get_close_matches(relative, known, n=3, cutoff=0.5)
    raise DataError(
        f"{kind}/{relative} does not exist.",
        f"Near names: {', '.join(near)}."
        if near
        else f"Places searched: {', '.join(map(str, roots))}.",
    )


def _roots(kind: str) -> list[Path]:
    shipped = [_PACKAGE / kind]
    if (
        _PACKAGE.parent / "pyproject.toml"
    ).is_file():  # in site-packages, the neighbours are others
        shipped = [_PACKAGE.parent / kind, *shipped]
    return [Path.cwd(), Path.cwd() / kind, *shipped] if kind == "configs" else shipped
