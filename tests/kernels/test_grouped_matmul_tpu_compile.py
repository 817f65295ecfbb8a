"""The TPU kernels through the real compiler, on a machine without a TPU."""

from __future__ import annotations

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moejax_kernels import aot
from moejax_kernels.chips import CHIPS
from moejax_kernels.gated_grouped_matmul import gated_grouped_matmul
from moejax_kernels.grouped_matmul import grouped_matmul
from moejax_kernels.grouped_matmul.cases import NAMES, case
from moejax_kernels.grouped_matmul.tiles import tiles_for
from moejax_kernels.shapes import Experts

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
TPUS = [chip for chip in CHIPS.values() if chip.platform == "tpu"]
SHAPE = Experts("small", 512, 256, 4, 2).gate(512)
DECODE = Experts("small", 512, 256, 4, 2).gate(8)


def through_the_op(dtype):
    """Forward and both gradients by the public op, nothing a multiple of a tile."""

    def loss(x, w, sizes, offset):
        y = grouped_matmul(x, w, sizes, group_offset=offset)
        return jnp.square(y.astype(jnp.float32)).sum()

    shapes = [((700, 200), dtype), ((3, 200, 300), dtype), ((5,), "int32"), ((), "int32")]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return aot.Program(jax.value_and_grad(loss, (0, 1)), abstract)


def gated():
    w = jax.ShapeDtypeStruct((4, 256, 384), jnp.bfloat16)
    x, sizes = jax.ShapeDtypeStruct((64, 256), w.dtype), jax.ShapeDtypeStruct((4,), jnp.int32)
    return aot.Program(gated_grouped_matmul, (x, w, w, sizes))


@pytest.fixture(scope="module", params=TPUS, ids=lambda chip: chip.name)
def compiled(request):
    """chip, cases by kernel, reports: one start of the compiler per chip."""
    chip = request.param
    cases = {"decode": case("forward", DECODE, tiles("forward", DECODE, chip))}
    cases |= {kernel: case(kernel, SHAPE, tiles(kernel, SHAPE, chip)) for kernel in NAMES}
    programs = {name: one.program for name, one in cases.items()}
    programs |= {"gated": gated(), "bfloat16": through_the_op("bfloat16")}
    if chip.name == "v6e":
        programs["float32"] = through_the_op("float32")
    return chip, cases, aot.compile_all(programs, chip=chip)


def tiles(kernel, shape, chip):
    sides = (
        (shape.outputs, shape.inputs) if kernel == "transposed" else (shape.inputs, shape.outputs)
    )
    return tiles_for(kernel, shape.rows, *sides, shape.experts, jnp.bfloat16, chip=chip)


def test_every_chip_compiles_every_kernel(compiled):
    """Catches an operation that one generation's compiler refuses, and code whose regions the
    schedule does not show as the kernel is written, so that its cycles are counted wrong."""
    chip, cases, reports = compiled
    sizes = np.array([300, 0, 17, 707])
    for name in NAMES:
        kernel = reports[name].kernel(cases[name].kernel)
        cost = aot.cost(
            kernel,
            cases[name].counts(kernel, sizes),
            hbm_bytes=cases[name].hbm_bytes(sizes),
            flops=SHAPE.flops,
        )
        assert 0 < cost.useful_cycles < cost.cycles < 12 * cost.useful_cycles
        assert SHAPE.rows * 2 * (512 + 256) <= cost.hbm_cycles * chip.bytes_per_cycle


def test_the_inner_loop_does_not_spill(compiled):
    """Catches blocks whose sums do not fit the registers."""
    chip, _, reports = compiled
    most = 16 if chip.name == "tpu7x" else 0
    for name in ("forward", "transposed", "decode"):
        kernel = reports[name].kernel("grouped_matmul")
        assert kernel.spills(kernel.hot()) <= most


def test_decode_is_bound_by_hbm(compiled):
    """Catches a decode path that computes whole tiles of rows while HBM waits."""
    chip, cases, reports = compiled
    kernel = reports["decode"].kernel("grouped_matmul")
    sizes = np.array([8, 0, 7, 1])
    region = max(kernel.root.walk(), key=lambda region: kernel.matmul[kernel.own(region)].sum())
    one_expert = 512 * 256 * 2 / chip.bytes_per_cycle
    assert kernel.once(region) < 1.5 * one_expert + 400
    assert cases["decode"].hbm_bytes(sizes) < 1.2 * cases["decode"].least_bytes(sizes)
