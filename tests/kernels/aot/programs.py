"""Programs whose schedules the tests read; recorded by `python -m tests.kernels.aot.programs`.

A recording keeps labels, branches, scalar code, copies and matrix instructions of every bundle, and
drops the vector code between them.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from moejax_kernels import aot
from moejax_kernels.chips import CHIPS

DUMPS = Path(__file__).parent / "dumps"


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def branching(lengths_8, x_256x128, w_128x128):
    """3 x 2 steps of: a guard, a loop of unknown length around a guard, a loop of 5, a guard."""

    def kernel(lengths, x, w, y):
        @pl.when(pl.program_id(0) == 0)
        def _():
            y[...] = jnp.zeros_like(y)

        def add(i, total):
            @pl.when(lengths[i] > 3)
            def _():
                y[...] += x[...]

            return total + lengths[i]

        total = jax.lax.fori_loop(0, lengths[0], add, 0)

        def multiply(_, carry):
            y[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)
            return carry

        jax.lax.fori_loop(0, 5, multiply, 0)

        @pl.when(total > 3)
        def _():
            y[...] += jnp.dot(jnp.exp(x[...]), w[...], preferred_element_type=jnp.float32)

    rows = pl.BlockSpec((128, 128), lambda i, j, lengths: (j, 0))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(3, 2),
        in_specs=[rows, pl.BlockSpec((128, 128), lambda i, j, lengths: (0, 0))],
        out_specs=rows,
    )
    call = pl.pallas_call(kernel, out_shape=shape(256, 128), grid_spec=grid, name="branching")
    return call(lengths_8, x_256x128, w_128x128)


def matmul(x, w):
    def kernel(x, w, y):
        y[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    out = shape(x.shape[0], w.shape[1])
    return pl.pallas_call(kernel, out_shape=out, name="matmul")(x, w)


BRANCHING = aot.Program(branching, (shape(8, dtype=jnp.int32), shape(256, 128), shape(128, 128)))
MATMUL = aot.Program(
    matmul, (shape(128, 512, dtype=jnp.bfloat16), shape(512, 512, dtype=jnp.bfloat16))
)


_KEPT = re.compile(
    r"\s*(%s\w+ = s(add|phi|mov|ld|calar_select)|%p|%\d+ = (sbr|dma\.(?!done)|vmatmul|sst))"
)


def trimmed(bundle: str) -> str:
    """One bundle without its vector code."""
    head, _, body = bundle.partition("{")
    body, _, _ = body.rpartition("}")
    regions = re.findall(r"(?:Start/End empty|Start|End) region \d+", bundle)
    kept = [
        " ".join(re.sub(r"/\*(?!size_in).*?\*/", "", part, flags=re.DOTALL).split())
        for part in body.split(";;")
        if _KEPT.match(part)
    ]
    comment = f" /* {' :: '.join(regions)} */" if regions else ""
    return f"{head}{{ {'  ;;  '.join(kept)} }}{comment}\n"


def main() -> None:
    for name, chip in CHIPS.items():
        report = aot.compile_all({"p": BRANCHING}, chip=chip)["p"]
        (key,) = (key for key in report.dumps if key.startswith("branching"))
        _, utilization = report.dumps[key]
        text = "".join(trimmed(bundle) for bundle in report.kernel("branching").text)
        (DUMPS / f"{name}.txt").write_text(text + "==\n" + utilization)


if __name__ == "__main__":
    main()
