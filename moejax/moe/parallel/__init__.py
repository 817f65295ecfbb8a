"""Strategies of expert parallelism: who computes what of a routed block on a mesh.

| strategy | what moves, each way | drops |
| Local | everything, to every device | - |
| Ring | all tokens, by an all-gather, and a reduce-scatter of outputs | - |
| PaddedAllToAll | rows in equal blocks, by one all-to-all | beyond `factor` |
| HierarchicalAllToAll | the same, by one all-to-all per mesh axis | beyond `factor` |
| RaggedAllToAll | just the rows there are | beyond `factor` |
| ExpertsMove | experts, by all-gathers | - |
| TED | 1/model of the rows of one of the all-to-alls | as that |

All but Local and ExpertsMove also send a few integers per expert, for Ring the gates too.
"""

from moejax.moe.parallel.hierarchical import HierarchicalAllToAll
from moejax.moe.parallel.local import Local
from moejax.moe.parallel.moving import ExpertsMove
from moejax.moe.parallel.padded import PaddedAllToAll
from moejax.moe.parallel.ragged import RaggedAllToAll
from moejax.moe.parallel.ring import Ring
from moejax.moe.parallel.routed import routed
from moejax.moe.parallel.strategy import COMBINED, DISPATCHED, Bank, Choices, Parallel, Strategy
from moejax.moe.parallel.ted import TED

__all__ = [
    "COMBINED",
    "DISPATCHED",
    "TED",
    "Bank",
    "Choices",
    "ExpertsMove",
    "HierarchicalAllToAll",
    "Local",
    "PaddedAllToAll",
    "Parallel",
    "RaggedAllToAll",
    "Ring",
    "Strategy",
    "routed",
]
