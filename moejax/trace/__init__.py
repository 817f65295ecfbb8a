"""Routing traces: which experts every token chose, on disk, and what can be read off them.

A trace is written by `TraceWriter` (or, from a model's routings, by `TraceRecorder`), may be read
by `RoutingTrace` while it still grows, and is what placement, caching and prefetching are studied
on. `popularity`, `reuse_distances`, `coactivation`, `affinity` and `drift` are its statistics.
"""

from moejax.trace.layout import TraceLayout, TraceRows
from moejax.trace.reader import RoutingTrace
from moejax.trace.recorder import TraceRecorder, chosen, layout_of
from moejax.trace.statistics import (
    affinity,
    coactivation,
    drift,
    lift,
    popularity,
    reuse_distances,
)
from moejax.trace.writer import TraceWriter

__all__ = [
    "RoutingTrace",
    "TraceLayout",
    "TraceRecorder",
    "TraceRows",
    "TraceWriter",
    "affinity",
    "chosen",
    "coactivation",
    "drift",
    "layout_of",
    "lift",
    "popularity",
    "reuse_distances",
]
