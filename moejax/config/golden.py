"""Golden configs: what every shipped config says in full, so that no default changes unseen.

python -m moejax.config.golden [--write]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import moejax
from moejax.config.expand import bindings_text
from moejax.config.parse import load_config
from moejax.config.reader import Bindings
from moejax.config.values import Origin
from moejax.core.atomic import write_atomically

CHECKOUT = Path(moejax.__file__).resolve().parent.parent


def shipped_configs(root: Path = CHECKOUT) -> list[Path]:
    """All gin files below configs/."""
    return sorted((root / "configs").rglob("*.gin"))


def golden_path(config: Path, root: Path = CHECKOUT) -> Path:
    """Where the golden text of a config lies: tests/golden/<same path>.txt."""
    return root / "tests" / "golden" / config.relative_to(root / "configs").with_suffix(".txt")


def golden_text(config: Path) -> str:
    """The expanded config; for a file without `run.job`, meant to be included, what it binds."""
    read = Bindings()
    read.read_file(config, Origin.FILE)
    runs = any(selector.endswith(".run") for _, selector in read.by_key)
    return load_config(config).text if runs else bindings_text(read)


def main(arguments: list[str] | None = None, root: Path = CHECKOUT) -> int:
    """Compares all golden texts, or writes them; 1 when one is missing, stale or left over."""
    parser = argparse.ArgumentParser(prog="python -m moejax.config.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write them anew")
    write = parser.parse_args(arguments).write
    texts = {golden_path(config, root): golden_text(config) for config in shipped_configs(root)}
    left_over = set((root / "tests" / "golden").rglob("*.txt")) - set(texts)
    stale = [p for p, t in texts.items() if not p.is_file() or p.read_text(encoding="utf-8") != t]
    for path in sorted({*stale, *left_over}):
        action = "left over" if path in left_over else "written" if write else "stale"
        print(f"{path.relative_to(root)}: {action}")
        if write and path in left_over:
            path.unlink()
        elif write:
            write_atomically(path, texts[path])
    return 0 if write else int(bool(stale or left_over))


if __name__ == "__main__":
    raise SystemExit(main())
