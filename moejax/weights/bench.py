"""Time of GPTQ for all experts of a layer at once against a loop over jitted single experts.

python -m moejax.weights.bench [--experts 64] [--inputs 128] [--columns 128] [--group 64] [--bits 4]
    [--block 32] [--rounds 5]

Both are compiled before the first round and take turns, so that what else runs on the machine
slows both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.weights import AsymmetricGrid, gptq


def main(arguments: list[str] | None = None) -> float:
    """Prints both medians in milliseconds and returns how many times as long the loop takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = {"experts": 64, "inputs": 128, "columns": 128, "group": 64}
    for name, default in {**sizes, "bits": 4, "block": 32, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    w, moments = layer(given.experts, given.inputs, given.columns)
    grid = AsymmetricGrid(bits=given.bits, group=given.group)
    solve = jax.jit(lambda w, moments: gptq(w, moments, grid, block=given.block))
    singles = [(w[e], moments[e]) for e in range(given.experts)]
    ways = {"batched": lambda: solve(w, moments), "loop": lambda: [solve(*one) for one in singles]}
    medians = interleaved(ways, given.rounds)
    ratio = medians["loop"] / medians["batched"]
    print(
        f"{given.experts} experts of {given.inputs} x {given.columns}, {given.bits} bits, "
        f"group {given.group}, block {given.block}, {jax.default_backend()}: "
        f"batched {1e3 * medians['batched']:.1f} ms, loop {1e3 * medians['loop']:.1f} ms, "
        f"ratio {ratio:.2f}"
    )
    return ratio


def layer(experts: int, inputs: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Weights [E, K, N], and moments [E, K, K] of as many correlated rows as 4 K."""
    weight_key, row_key, mix_key = jax.random.split(jax.random.key(0), 3)
    w = 0.05 * jax.random.normal(weight_key, (experts, inputs, columns))
    mix = jax.random.normal(mix_key, (inputs, inputs)) / inputs**0.5
    x = jax.random.normal(row_key, (experts, 4 * inputs, inputs)) @ (jnp.eye(inputs) + mix)
    return w, jnp.einsum("erk,erj->ekj", x, x)


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
