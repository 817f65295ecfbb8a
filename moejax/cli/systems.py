"""The systems of the literature that ship as gin files, read from the headers of the files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from moejax.core.errors import ConfigError

FIELDS = ("Follows", "Deviates", "Headline", "Found", "Check")
ARXIV = re.compile(r"\s*\barXiv:(\d{4}\.\d{4,5})\b\.?")
HEADER = "# Name of the system. arXiv:0000.00000."


@dataclass(frozen=True)
class System:
    """A system: its file's family (folder) and slug (name), and the header of the file.

    arxiv: the paper's id, empty where there is none. headline: what the paper found; found: what
    the file finds on what it runs on. check: the path of the acceptance test.
    """

    family: str
    slug: str
    title: str
    arxiv: str
    follows: str
    deviates: str
    headline: str
    found: str
    check: str


def read_systems(root: Path) -> list[System]:
    """All systems below `root`, by family and slug; ConfigError for an incomplete header."""
    return [read_system(path, root) for path in sorted(root.rglob("*.gin"))]


def read_system(path: Path, root: Path) -> System:
    """The system in `path`, from the comments that begin the file.

    The title and the arXiv id come first, then lines that begin with one of `FIELDS`; other lines
    continue the one above.
    """
    values = {"title": ""}
    field = "title"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[1:].strip()
        word, _, rest = text.partition(" ")
        if word in FIELDS:
            field, text = word.lower(), rest.strip()
        values[field] = f"{values.get(field, '')} {text}".strip()
    missing = [name for name in ("title", *map(str.lower, FIELDS)) if not values.get(name)]
    if missing:
        raise ConfigError(
            f"{path.relative_to(root)}: its header has no {missing[0]}.",
            f"Begin it with {HEADER!r}, then {', '.join(f'# {f}' for f in FIELDS)}.",
        )
    arxiv = ARXIV.search(values["title"])
    values["title"] = ARXIV.sub("", values["title"]).strip().rstrip(".")
    family = str(path.parent.relative_to(root))
    return System(family=family, slug=path.stem, arxiv=arxiv[1] if arxiv else "", **values)


def show(systems: Sequence[System], console: Console) -> None:
    """Prints the systems as a table."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for column in ("moejax run systems/…", "paper", "follows", "deviates", "headline", "found"):
        table.add_column(column, overflow="fold")
    for system in systems:
        paper = f"{system.title} (arXiv:{system.arxiv})" if system.arxiv else system.title
        name = f"{system.family}/{system.slug}"
        words = (system.follows, system.deviates, system.headline, system.found)
        table.add_row(name, paper, *words)
    console.print(table)
    console.print(f"{len(systems)} systems")


def markdown(systems: Sequence[System]) -> str:
    """The systems as the page docs/systems.md: a table per family."""
    lines = ["# Systems of the literature", ""]
    lines.append(f"{len(systems)} systems ship as gin files: `moejax run systems/FAMILY/NAME`.")
    lines.append(
        "What was found here is what that command reports on the file's own model and text."
    )
    for family in dict.fromkeys(system.family for system in systems):
        lines += [
            "",
            f"## {family}",
            "",
            "| name | paper | follows | deviates | headline | found here | check |",
            "|---|---|---|---|---|---|---|",
        ]
        for system in systems:
            if system.family != family:
                continue
            paper = system.title
            if system.arxiv:
                paper = f"{paper} ([{system.arxiv}](https://arxiv.org/abs/{system.arxiv}))"
            words = (system.follows, system.deviates, system.headline, system.found)
            cells = [system.slug, paper, *words, f"`{system.check}`"]
            cells = [cell.replace("|", r"\|") for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
