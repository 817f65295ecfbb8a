"""Random rows, and a child process that records until it is killed."""

import sys
from pathlib import Path

import numpy as np

from moejax.trace import TraceLayout, TraceRows, TraceWriter

LAYOUT = TraceLayout("abc", layers=(1, 3), experts=(5, 3), choices=2, groups=("code", "prose"))


def random_rows(tokens: int, seed: int = 0, layout: TraceLayout = LAYOUT) -> TraceRows:
    """Every token chooses distinct experts, some tokens fewer than they may."""
    draw = np.random.default_rng(seed)
    shape = (tokens, len(layout.layers), layout.choices)
    expert = np.full(shape, -1, np.int16)
    for layer, count in enumerate(layout.experts):
        order = draw.random((tokens, count)).argsort(1)[:, : layout.choices]
        expert[:, layer, : order.shape[1]] = order
    expert[draw.random(tokens) < 0.2, :, 1:] = -1
    gate = np.where(expert >= 0, draw.random(shape), 0).astype(np.float32)
    request = np.arange(tokens, dtype=np.int32) // 7
    zero = np.zeros(tokens, np.int32)
    return TraceRows(
        request_T=request,
        step_T=zero,
        position_T=(np.arange(tokens) % 7).astype(np.int32),
        token_T=draw.integers(0, 1000, tokens).astype(np.int32),
        group_T=(request % 2).astype(np.int16),
        phase_T=zero.astype(np.uint8),
        expert_TxLxK=expert,
        gate_TxLxK=gate,
    )


def record(folder: Path, rows: TraceRows, layout: TraceLayout = LAYOUT) -> None:
    with TraceWriter(folder, layout) as writer:
        writer.append(rows)


if __name__ == "__main__":  # records 1000 rows per flush, and says so, until it is killed
    writer = TraceWriter(sys.argv[1], LAYOUT)
    for number in range(10**6):
        writer.append(random_rows(1000, seed=number))
        writer.flush()
        print(number + 1, flush=True)
        writer.append(random_rows(999, seed=-1 % 2**31))
