"""Other people's grouped matmuls on TPU: megablox's descendants in tokamax, and what XLA makes.

tokamax and qwix are optional (`pip install tokamax==0.0.12 qwix==0.1.8`, extra: bench); tokamax
pins a typeguard that no other extra takes, so that they want an environment of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from moejax_kernels import aot
from moejax_kernels.chips import Chip
from moejax_kernels.shapes import Shape

from experiments.benchmarks import megablox


def missing() -> tuple[str, ...]:
    """Names of peers that are not installed."""
    return tuple(name for name in ("tokamax", "qwix") if find_spec(name) is None)


def kernels(shape: Shape, chip: Chip, sizes: np.ndarray, tilings: int) -> Iterator[aot.Case]:
    """Peers that are one Pallas kernel: megablox, and tokamax at the same tilings."""
    for case in megablox.cases(shape, chip, sizes, tilings):
        yield case
        tiling = tuple(int(size) for size in case.name.split()[1].split("x"))
        if find_spec("tokamax") is not None and min(shape.rows, *tiling) >= 128:
            yield case._replace(
                name=case.name.replace("megablox", "tokamax"),
                program=aot.Program(partial(_tokamax, tiling), case.program.shapes),
                kernel="gmm_megablox",
            )


def programs(shape: Shape) -> dict[str, aot.Program]:
    """Peers that the compiler takes apart into its own ops; only its estimate is known of them."""
    x = jax.ShapeDtypeStruct((shape.rows, shape.inputs), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((shape.experts, shape.inputs, shape.outputs), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((shape.experts,), jnp.int32)
    found = {"jax.lax.ragged_dot": aot.Program(jax.lax.ragged_dot, (x, w, sizes))}
    if find_spec("qwix") is not None:
        codes = jax.ShapeDtypeStruct(w.shape, jnp.int8)
        scale = jax.ShapeDtypeStruct((shape.experts, 1, shape.outputs), jnp.float32)
        found["qwix int8"] = aot.Program(_qwix, (x, codes, scale, sizes))
    return found


def _tokamax(tiling, x, w, sizes):
    # The kernel itself: the op around it looks for an attached TPU.
    kernel = import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel")
    exact = import_module("tokamax._src.precision").canonicalize_precision(None)
    return kernel.gmm(x, w, sizes, precision=exact, out_dtype=x.dtype, tiling=tiling)


def _qwix(x, codes, scale, sizes):
    qwix = import_module("qwix")
    ragged_dot = import_module("qwix._src.core.ragged_dot")
    array = qwix.QArray(qvalue=codes, scale=scale)
    return ragged_dot.ragged_dot(qwix.quantize(x, jnp.int8, channelwise_axes=[0]), array, sizes)
