"""A report: one self-contained HTML page and the same facts as JSON. All text is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from moejax.core.atomic import write_atomically, write_json
from moejax.report.style import STYLE
from moejax.report.tables import Table
from moejax.runs.records import to_record


class Page:
    """Collects sections, then writes report.html and report.json.

    facts: what goes into the JSON; whoever adds a section adds its facts.
    plots: folder of the figures; they are embedded into the page, and stay there as files.
    """

    def __init__(self, title: str, subtitle: str, plots: Path):
        self.title, self.subtitle, self.plots = title, subtitle, plots
        self.facts: dict[str, Any] = {}
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []

    def lead(self, sentences: Sequence[str]) -> None:
        """The sentences that stand above everything."""
        self._parts.append('<div class="lead">')
        self._parts.extend(f"<p>{escape(sentence)}</p>" for sentence in sentences)
        self._parts.append("</div>")

    def section(self, title: str) -> None:
        """Begins a section and gives it a place in the contents."""
        anchor = f"section-{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{escape(title)}</h2>')

    def text(self, text: str, *, quiet: bool = False) -> None:
        """A paragraph."""
        look = ' class="quiet"' if quiet else ""
        self._parts.append(f"<p{look}>{escape(text)}</p>")

    def verdicts(self, verdicts: Sequence[tuple[str, bool, str]]) -> None:
        """A list of expectations: name, held, detail."""
        self._parts.append('<ul class="verdicts">')
        for name, held, detail in verdicts:
            word = '<b class="held">held</b>' if held else '<b class="failed">did not hold</b>'
            self._parts.append(f"<li>{word} <span>{escape(name)}</span> {escape(detail)}</li>")
        self._parts.append("</ul>")

    def table(self, table: Table) -> None:
        """A table in a box that scrolls by itself."""
        self._parts.append(table_html(table))

    def folded(self, summary: str, *tables: Table) -> None:
        """Tables that open on a click."""
        inner = "".join(table_html(table) for table in tables)
        self._parts.append(f"<details><summary>{escape(summary)}</summary>{inner}</details>")

    def folded_code(self, summary: str, text: str) -> None:
        """A file that opens on a click."""
        pre = f'<pre tabindex="0">{escape(text)}</pre>'
        self._parts.append(f"<details><summary>{escape(summary)}</summary>{pre}</details>")

    def code(self, text: str) -> None:
        """A command or a file, verbatim."""
        self._parts.append(f'<pre tabindex="0">{escape(text)}</pre>')

    def figures(self, figures: Sequence[tuple[Path, str, str]]) -> None:
        """Figures side by side where there is room: (file, alternative text, caption)."""
        wide = " wide" if len(figures) == 1 else ""
        self._parts.append(f'<div class="figures{wide}">')
        for path, alt, caption in figures:
            data = base64.b64encode(path.read_bytes()).decode()
            self._parts.append(
                f'<figure><div tabindex="0"><img alt="{escape(alt)}" '
                f'src="data:image/png;base64,{data}"></div>'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
            self.facts.setdefault("figures", []).append(
                {"file": f"plots/{path.name}", "caption": caption}
            )
        self._parts.append("</div>")

    def html(self) -> str:
        """The page; it loads nothing from elsewhere and runs no script."""
        links = "".join(f'<a href="#{a}">{escape(title)}</a>' for a, title in self._sections)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<header><h1>{escape(self.title)}</h1>"
            f'<p class="quiet">{escape(self.subtitle)}</p></header>\n'
            f"<nav>{links}</nav>\n" + "\n".join(self._parts) + "\n</main>\n</body>\n</html>\n"
        )

    def save(self, folder: Path) -> Path:
        """Writes report.json, then report.html, each whole or not at all; returns the page."""
        write_json(folder / "report.json", to_record({"title": self.title, **self.facts}))
        write_atomically(folder / "report.html", self.html())
        return folder / "report.html"


def table_html(table: Table) -> str:
    """A table as HTML, numbers right-aligned, the first column as row heads."""
    sides = ["" if column.text else ' class="number"' for column in table.columns]
    heads = "".join(
        f'<th scope="col"{side}{_title(column.hint)}>{escape(column.name)}</th>'
        for column, side in zip(table.columns, sides, strict=True)
    )
    rows = []
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row.cells[0].text)}</th>']
        cells += [
            f"<td{side}{_title(cell.exact)}>{escape(cell.text)}</td>"
            for cell, side in zip(row.cells[1:], sides[1:], strict=True)
        ]
        look = ' class="marked"' if row.marked else ""
        rows.append(f"<tr{look}>{''.join(cells)}</tr>")
    return (
        f'<p class="quiet">{escape(table.caption)}</p>'
        f'<div class="table" tabindex="0"><table aria-label="{escape(table.caption)}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _title(text: str) -> str:
    return f' title="{escape(text)}"' if text else ""
