"""Time of GPTQ for all experts of a layer at once against loops over jitted single experts.

python -m moejax.weights.bench [--experts 64] [--widths 64 128 256] [--bits 4] [--rounds 5]

Two peers: `single`, our own GPTQ on one expert after the other, and `paper`, the algorithm as
arXiv:2210.17323 states it, one expert after the other: the inverse's Cholesky factor, blocks of 128
inputs, every input's error taken at once from the others of its block. All are compiled before the
first round and take turns, so that what else runs slows all; ratios are those of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from moejax.weights import AsymmetricGrid, gptq

PAPER_BLOCK = 128


def main(arguments: list[str] | None = None) -> dict[int, dict[str, float]]:
    """Prints medians in milliseconds; returns, per width, how many times as long the loops take."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    ratios = {}
    for width in given.widths:
        grid = AsymmetricGrid(bits=given.bits, group=64)
        medians = interleaved(ways(*layer(given.experts, width), grid), given.rounds)
        ratios[width] = {name: medians[name] / medians["batched"] for name in ("single", "paper")}
        print(
            f"{given.experts} experts of {width} x {width}, {given.bits} bits, "
            f"{jax.default_backend()}: batched {1e3 * medians['batched']:.1f} ms, "
            + ", ".join(
                f"{name} {1e3 * medians[name]:.1f} ms (ratio {ratio:.2f})"
                for name, ratio in ratios[width].items()
            )
        )
    return ratios


def layer(experts: int, width: int) -> tuple[Array, Array]:
    """Weights [E, K, K], and moments [E, K, K] of as many correlated rows as 4 K."""
    weight_key, row_key, mix_key = jax.random.split(jax.random.key(0), 3)
    w = 0.05 * jax.random.normal(weight_key, (experts, width, width))
    mix = jax.random.normal(mix_key, (width, width)) / width**0.5
    x = jax.random.normal(row_key, (experts, 4 * width, width)) @ (jnp.eye(width) + mix)
    return w, jnp.einsum("erk,erj->ekj", x, x)


def ways(w: Array, moments: Array, grid: AsymmetricGrid) -> dict[str, Callable[[], object]]:
    """What is timed; each gives the weights of all experts."""
    ours = jax.jit(lambda w, moments: gptq(w, moments, grid).weight)
    paper = jax.jit(lambda w, moments: as_in_the_paper(w, moments, grid))
    each = [(w[e], moments[e]) for e in range(len(w))]
    return {
        "batched": lambda: ours(w, moments),
        "single": lambda: [ours(*one) for one in each],
        "paper": lambda: [paper(*one) for one in each],
    }


def as_in_the_paper(w: Array, moments: Array, grid: AsymmetricGrid) -> Array:
    """Codes [K, N] of one matrix: Algorithm 1, on rows instead of columns."""
    inputs, group = len(w), grid.group or len(w)
    h = moments + 0.01 * jnp.diagonal(moments).mean() * jnp.eye(inputs)
    inverse = jnp.linalg.inv(h)
    u = jnp.linalg.cholesky(inverse, upper=True)
    codes = jnp.zeros(w.shape, jnp.uint8)
    for first in range(0, inputs, PAPER_BLOCK):
        block = slice(first, min(first + PAPER_BLOCK, inputs))
        within = u[block, block]

        def one_row(k: Array, state: tuple, block: slice = block, within: Array = within) -> tuple:
            w, errors, codes, scales = state
            here = w[block]
            scales = lax.cond(
                k % group == 0,
                lambda s: grid.scales(lax.dynamic_slice_in_dim(here, k, group)),
                lambda s: s,
                scales,
            )
            row = here[k][None]
            code = grid.codes(row, *scales)
            error = (row - grid.values(code, *scales)) / within[k, k]
            # Rows before k have no share in row k of an upper factor.
            w = w.at[block].add(-within[k][:, None] * error)
            return w, errors.at[k].set(error[0]), codes.at[block.start + k].set(code[0]), scales

        state = (w, jnp.zeros_like(w[block]), codes, grid.scales(w[:group]))
        w, errors, codes, _ = lax.fori_loop(0, len(within), one_row, state)
        w = w.at[block.stop :].add(-u[block, block.stop :].T @ errors)
    return codes


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way over rounds in which they take turns; compiled beforehand."""
    for way in ways.values():
        jax.block_until_ready(way())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way())
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
