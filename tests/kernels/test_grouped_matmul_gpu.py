"""The GPU kernels in Pallas's interpret modes against the oracle, and their lowering without a GPU.

No test runs on a card. What the interpreters do not show (races, descriptors of copies) only the
compiler and a card can.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
)
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from moejax_kernels.grouped_matmul import (
    grouped_matmul,
    pallas_gpu,
    pallas_triton,
    reference,
)
from moejax_kernels.grouped_matmul.row_tiles import SLAB, in_slabs, row_tiles
from moejax_kernels.shapes import MODELS

R, E = 150, 3
SIZES = {
    "uneven": ([50, 3, 90], 0),
    "empty and tiny": ([0, 1, 0], 0),
    "no row": ([0, 0, 0], 0),
    "one takes all": ([0, R, 0], 0),
    "multiples of a tile": ([64, 0, 64], 0),
    "more rows than there are": ([100, 40, 40], 0),
    "later groups": ([37, 20, 41], 1),
    "groups before the first": ([30, 30, 30], -1),
    "groups beyond the last": ([30, 30, 30], 3),
}


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def spread(case):
    """Sizes, offset and a mask of the rows that no expert has."""
    sizes, offset = SIZES[case]
    ends = np.minimum(np.cumsum(sizes), R)
    outside = np.ones(R, bool)
    for g, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if 0 <= g - offset < E:
            outside[start:end] = False
    return jnp.asarray(sizes, jnp.int32), jnp.int32(offset), outside


def operands(case, inputs, columns, dtype):
    """x, w, dy, sizes, offset; rows of no expert are NaN."""
    sizes, offset, outside = spread(case)
    x = normal(0, R, inputs, dtype=dtype).at[outside].set(jnp.nan)
    dy = normal(2, R, columns, dtype=dtype).at[outside].set(jnp.nan)
    return x, normal(1, E, inputs, columns, dtype=dtype), dy, sizes, offset


@jax.jit
def oracle(x, w, dy, sizes, offset):
    def product(x, w):
        return reference.grouped_matmul_of(x, w, lambda w: w, sizes, offset)

    x, w, dy = (a.astype(jnp.float32) for a in (x, w, dy))
    y, pull_back = jax.vjp(product, x, w)
    return y, *pull_back(jnp.nan_to_num(dy))


def products(kernels, options, x, w, dy, sizes, offset):
    return (
        kernels.forward(x, w, sizes, offset, **options),
        kernels.forward(dy, w, sizes, offset, transposed=True, **options),
        kernels.weight_gradient(x, dy, sizes, offset, experts=E, dtype=w.dtype, **options),
    )


def compare(got, arrays):
    dtype = arrays[0].dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.01, "atol": 0.1}
    for mine, exact in zip(got, oracle(*arrays), strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.float64(mine), np.float64(exact), **tolerance)


triton_products = jax.jit(partial(products, pallas_triton, {"interpret": True}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SIZES)
def test_triton_products(case, dtype):
    """Catches a mask left out where a tile hangs over rows, columns or inputs (none of them is a
    multiple of a tile), rows of a neighbour in a sum (NaN here), and tiles that never write."""
    arrays = operands(case, 40, 50, dtype)
    compare(triton_products(*arrays), arrays)


@pytest.fixture(scope="module")
def hopper_products():
    """The Mosaic kernels interpreted, with stand-ins for what JAX 0.10.2's interpreter lacks:
    transposed operands of the matrix unit, and loads and iotas with a register layout."""
    plgpu, wgmma = pallas_gpu.plgpu, pallas_gpu.plgpu.wgmma

    def by_copy(acc, a, b):
        def as_is(ref, then):
            if not isinstance(ref, tuple):
                return then(ref)
            (ref,) = ref

            def copied(transposed):
                transposed[...] = ref[...].T
                then(transposed)

            return pl.run_scoped(copied, plgpu.SMEM(ref.shape[::-1], ref.dtype))

        as_is(a, lambda a: as_is(b, lambda b: wgmma(acc, a, b)))

    def iota(dtype, shape, dimension, layout):
        return jax.lax.broadcasted_iota(dtype, shape, dimension)

    # Copies from beyond the last row bring NaN here, zeros on a card: nothing may depend on them.
    params = InterpretGPUParams(out_of_bounds_reads="uninitialized")
    call = jax.jit(partial(products, pallas_gpu, {"programs": 2}))

    def interpreted(*arrays):
        with pytest.MonkeyPatch.context() as patch, force_gpu_interpret_mode(params):
            patch.setattr(plgpu, "wgmma", by_copy)
            patch.setattr(plgpu, "transpose_ref", lambda ref, _: (ref,))
            patch.setattr(plgpu, "load", lambda ref, _, layout: ref[...])
            patch.setattr(plgpu, "broadcasted_iota", iota)
            return call(*arrays)

    return interpreted


@pytest.mark.parametrize("case", SIZES)
def test_hopper_products(hopper_products, case):
    """Catches rows stored for a neighbour or not at all, tiles that two programs or none computes,
    a wrong expert's weights, a last step of the weight gradient that is not masked (NaN here)."""
    arrays = operands(case, 64, 128, "bfloat16")
    compare(hopper_products(*arrays), arrays)


@pytest.mark.parametrize("height", [16, 64])
def test_row_tiles_write_every_row(height):
    """Catches a bound on the number of tiles that is too low, and tiles that cross a group."""
    tiles_of = jax.jit(partial(row_tiles, experts=E, rows=R, height=height))
    for case in SIZES:
        sizes, offset, outside = spread(case)
        tiles = jax.tree.map(np.asarray, tiles_of(sizes, offset))
        count = tiles.count_1[0]
        assert count <= len(tiles.row_B) and not tiles.size_B[count:].any()
        ends = np.cumsum(sizes)
        owner = np.full(R, -2)
        for row, size, expert in zip(*(a[:count] for a in tiles[:3]), strict=True):
            assert 0 < size <= height and row + size <= R
            assert set(owner[row : row + size]) <= {-2, expert}
            owner[row : row + size] = expert
        expected = np.searchsorted(ends, np.arange(R), side="right") - int(offset)
        np.testing.assert_array_equal(owner, np.where(outside, -1, expected))


@pytest.mark.parametrize("columns", [1, SLAB, SLAB + 3])
def test_slabs_visit_every_tile_once(columns):
    """Catches a last slab, narrower than the others, that is walked as if it were full."""
    steps = jnp.arange(5 * columns, dtype=jnp.int32)
    row, column = jax.vmap(lambda step: in_slabs(step, 5, columns))(steps)
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == 5 * columns
    assert row.max() == 4 and column.max() == columns - 1


MOSAIC, TRITON = "@mosaic_gpu_v2", "@__gpu$xla.gpu.triton"


def lowered(f, *shapes):
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def gradients(backend):
    def loss(x, w, sizes):
        return jnp.square(grouped_matmul(x, w, sizes, backend=backend).astype(jnp.float32)).sum()

    return jax.value_and_grad(loss, (0, 1))


REAL = [
    pytest.param(model.gate(tokens), marks=[pytest.mark.slow] if tokens == 8 else [])
    for model in MODELS
    for tokens in (8, 4096)
]


@pytest.mark.parametrize("shape", REAL, ids=lambda shape: shape.name)
def test_real_shapes_lower(shape):
    """Catches a shape of a real model that a kernel refuses, or that falls back to another way:
    forward and both gradients must be kernels."""
    shapes = [
        ((shape.rows, shape.inputs), "bfloat16"),
        ((shape.experts, shape.inputs, shape.outputs), "bfloat16"),
        ((shape.experts,), "int32"),
    ]
    assert lowered(gradients("pallas_gpu"), *shapes).count(f"custom_call {MOSAIC}") == 3
    if shape.experts == 256:  # banks beyond 4 GiB; the Triton kernels know no other special shape
        assert lowered(gradients("pallas_triton"), *shapes).count(f"custom_call {TRITON}") == 3


def small(inputs, columns, x_dtype, w_dtype):
    return [((96, inputs), x_dtype), ((E, inputs, columns), w_dtype), ((E,), "int32")]


@pytest.mark.parametrize(
    "inputs, x_dtype, w_dtype, kernel",
    [
        (64, "float16", "float16", MOSAIC),
        (40, "bfloat16", "bfloat16", TRITON),
        (64, "bfloat16", "float32", TRITON),
    ],
)
def test_what_one_kernel_does_not_take_goes_to_the_next(inputs, x_dtype, w_dtype, kernel):
    """Catches a kernel fed with operands it cannot take, and a fallback taken without need."""
    text = lowered(gradients("pallas_gpu"), *small(inputs, 128, x_dtype, w_dtype))
    assert {name for name in (MOSAIC, TRITON) if name in text} == {kernel}


def test_without_a_triton_lowering(monkeypatch):
    """Catches a dependence on what later JAX releases drop: the portable way must take over."""
    monkeypatch.setattr(pallas_triton, "triton_params", lambda **_: None)
    text = lowered(gradients("pallas_triton"), *small(64, 576, "float32", "float32"))
    assert TRITON not in text and "stablehlo.while" in text


def test_nothing_is_chosen_that_has_not_run():
    """Catches kernels that no card has run yet behind backend=None."""
    text = lowered(gradients(None), *small(64, 256, "bfloat16", "bfloat16"))
    assert MOSAIC not in text and TRITON not in text


@pytest.mark.parametrize("backend, name", [("pallas_gpu", MOSAIC), ("pallas_triton", TRITON)])
def test_lowers_inside_shard_map(backend, name):
    """Catches results without the mesh axes over which the operands vary."""
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P())
    def block(x, w, sizes):
        first = jax.lax.axis_index("expert") * w.shape[0]
        y = grouped_matmul(x, w, sizes, group_offset=first, backend=backend)
        return jax.lax.psum(y, "expert")

    def loss(x, w, sizes):
        return jnp.square(block(x, w, sizes)).sum()

    shapes = small(64, 128, "bfloat16", "bfloat16")
    assert name in lowered(jax.value_and_grad(loss, (0, 1)), *shapes)
