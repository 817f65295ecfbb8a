"""Strategies of expert parallelism: who computes what of a routed block on a mesh."""

from moejax.moe.parallel.local import Local
from moejax.moe.parallel.padded import PaddedAllToAll
from moejax.moe.parallel.routed import routed
from moejax.moe.parallel.strategy import Bank, Choices, Parallel, Strategy

__all__ = [
    "Bank",
    "Choices",
    "Local",
    "PaddedAllToAll",
    "Parallel",
    "Strategy",
    "routed",
]
