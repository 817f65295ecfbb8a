"""One-page reports drawn from run folders: HTML that needs nothing else, and the same as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.report.build import build_report
    from moejax.report.compare import compare_reports
    from moejax.report.summary import print_summary

__all__ = ["build_report", "compare_reports", "print_summary"]

_PLACES = {
    "build_report": "build",
    "compare_reports": "compare",
    "print_summary": "summary",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: matplotlib takes its time."""
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
