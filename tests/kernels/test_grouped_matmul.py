"""The grouped matmul against a float64 oracle, on every backend, with gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moejax_kernels.grouped_matmul import (
    BACKENDS,
    FAST_COMPILE,
    FAST_RUN,
    block_heights,
    grouped_matmul,
    grouped_matmul_of,
)
from moejax_kernels.grouped_matmul.xla import class_heights

K, N, E = 6, 5, 3


def oracle(x, w, sizes, offset=0):
    """float64 y[r] = x[r] @ w[group(r) - offset], from the definition."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, row = np.zeros((len(x), w.shape[2])), 0
    for group, size in enumerate(np.asarray(sizes)):
        if 0 <= group - offset < len(w):
            y[row : row + size] = x[row : row + size] @ w[group - offset]
        row += size
    return y


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("rows", [1, 7, 40, 300])
@pytest.mark.parametrize("groups", [E, 5])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_group_sizes(rows, groups, data):
    """Catches blocks that spill into the next group, and lost empty, tiny or last groups."""
    cuts = sorted(data.draw(st.integers(0, rows)) for _ in range(groups))
    sizes = np.diff([0, *cuts]).astype(np.int32)
    offset = data.draw(st.integers(-1, groups))
    x, w = normal(0, rows, K), normal(1, E, K, N)
    y = grouped_matmul(x, w, jnp.asarray(sizes), group_offset=jnp.int32(offset))
    np.testing.assert_allclose(y, oracle(x, w, sizes, offset), atol=1e-5)


# The last group ends in several short blocks, of which the last is moved back to fit the rows.
R, SIZES = 300, jnp.asarray([88, 0, 210], jnp.int32)
USED = 298


def loss(x, w, sizes, backend):
    y = grouped_matmul(x, w, sizes, backend=backend)
    return jnp.square(y.astype(jnp.float32)).sum(), y


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_backend_and_its_gradients(backend, dtype):
    """Catches a backend with other rounding, a wrong transposed weight, a dw of masked rows."""
    x, w = normal(0, R, K, dtype=dtype), normal(1, E, K, N, dtype=dtype)
    (_, y), (dx, dw) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w, SIZES, backend)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    exact = oracle(x, w, SIZES)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == "float32" else {"rtol": 0.02, "atol": 0.5}
    np.testing.assert_allclose(np.float64(y), exact, **tolerance)
    dy = 2 * exact
    transposed = np.swapaxes(np.float64(w), 1, 2)
    np.testing.assert_allclose(np.float64(dx), oracle(dy, transposed, SIZES), **tolerance)
    assert not np.any(np.float64(dx)[USED:])
    ends = np.cumsum(SIZES)
    for e, (start, end) in enumerate(zip(ends - SIZES, ends, strict=True)):
        exact_dw = np.float64(x)[start:end].T @ dy[start:end]
        np.testing.assert_allclose(np.float64(dw)[e], exact_dw, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_groups_do_not_leak(backend):
    """Catches padding rows that reach the output or, as 0 * NaN, the gradient of the weights."""
    x = normal(0, R, K).at[USED:].set(jnp.nan)
    w = normal(1, E, K, N)
    y, pull_back = jax.vjp(lambda x, w: grouped_matmul(x, w, SIZES, backend=backend), x, w)
    dx, dw = pull_back(y.at[USED:].set(jnp.nan))
    assert np.isfinite(y).all() and not np.any(y[USED:])
    assert np.isfinite(dx).all() and np.isfinite(dw).all()


def test_accumulates_in_float32():
    """Catches sums kept in bfloat16, where 256 + 1 = 256."""
    x, w = jnp.ones((9, 512), jnp.bfloat16), jnp.ones((1, 512, 2), jnp.bfloat16)
    y = grouped_matmul(x, w, jnp.asarray([9]), backend="xla")
    np.testing.assert_array_equal(np.float32(y), 512)
    many = jnp.ones((1024, 2), jnp.bfloat16)

    def total(w):
        return grouped_matmul(many, w, jnp.asarray([1024]), backend="xla").astype(jnp.float32).sum()

    dw = jax.grad(total)(jnp.ones((1, 2, 2), jnp.bfloat16))
    np.testing.assert_array_equal(np.float32(dw), 1024)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_with_checkpoint(remat):
    """Catches trip counts that scan, remat or traced group sizes turn static or wrong."""
    w_LxExKxK, x = 0.5 * normal(1, 2, E, K, K), normal(0, R, K)

    def layer(backend, sizes, x, w):
        return jnp.tanh(grouped_matmul(x, w, sizes, backend=backend)), None

    def total(w, sizes, backend):
        body = partial(layer, backend, sizes)
        y, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x, w)
        return jnp.square(y).sum()

    step = jax.jit(jax.value_and_grad(total), static_argnums=2)
    value, dw = step(w_LxExKxK, SIZES, None)
    wanted, wanted_dw = step(w_LxExKxK, SIZES, "reference")
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(dw, wanted_dw, rtol=1e-4, atol=1e-5)


def test_vmap_over_rows_that_share_a_bank():
    """Catches a batch whose members get each other's rows, or a gradient of one member only."""
    by_loops = partial(grouped_matmul, backend="xla")
    x, w = normal(0, 3, 40, K), normal(1, E, K, N)
    sizes = jnp.asarray([11, 0, 25], jnp.int32)

    def total(w):
        return jnp.square(jax.vmap(by_loops, (0, None, None))(x, w, sizes)).sum()

    y = jax.vmap(by_loops, (0, None, None))(x, w, sizes)
    wanted = np.stack([oracle(x[i], w, sizes) for i in range(3)])
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    ends = np.cumsum(sizes)
    dw = jax.grad(total)(w)
    for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        exact = np.einsum("brk,brn->kn", np.float64(x)[:, start:end], 2 * wanted[:, start:end])
        np.testing.assert_allclose(dw[e], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("check", [False, True])
def test_shard_map_over_rows(check):
    """Catches carries that shard_map refuses, and a weight gradient of one device's rows only."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()
    x, w, sizes = normal(0, R, K), normal(1, E, K, N), SIZES

    def total(x, w, sizes):
        y = jax.shard_map(
            partial(grouped_matmul, backend="xla"),
            mesh=mesh,
            in_specs=(rows, whole, whole),
            out_specs=rows,
            check_vma=check,
        )(x, w, sizes)
        return jnp.square(y).sum()

    got = jax.jit(jax.grad(total, (0, 1)))(x, w, sizes)
    wanted = jax.grad(lambda *a: loss(*a, "reference")[0], (0, 1))(x, w, sizes)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_vmap_over_banks():
    """Catches a loop whose batched trip counts skip the rows of one batch member."""
    x, w = normal(0, 2, 20, K), normal(1, 2, E, K, N)
    sizes = jnp.asarray([[20, 0, 0], [3, 9, 4]], jnp.int32)
    y = jax.vmap(grouped_matmul)(x, w, sizes)
    for i in range(2):
        np.testing.assert_allclose(y[i], oracle(x[i], w[i], sizes[i]), atol=1e-5)


def buffers(program):
    """What a compiled program writes to memory: its HLO without the bodies of fusions."""
    kept, inside = [], False
    for line in program.as_text().splitlines():
        inside = line.startswith(("%fused_computation", "%wrapped_")) or (inside and line != "}")
        if not inside:
            kept.append(line)
    return "\n".join(kept)


@pytest.mark.parametrize("rows", [14, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_bfloat16_bank_is_not_upcast_whole(rows, dtype):
    """Catches the XLA:CPU trap: a float32 copy, or any copy, of the bank on every call."""
    E, K, N = 7, 640, 480
    shapes = [((rows, K), dtype), ((E, K, N), jnp.bfloat16), ((E,), jnp.int32)]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    program = jax.jit(grouped_matmul).lower(*abstract).compile()
    assert f"f32[{E},{K},{N}]" not in buffers(program)
    assert program.memory_analysis().temp_size_in_bytes < E * K * N * 2
    assert f"bf16[{E},{K},{N}]" in buffers(program)  # the search would find a copy


def test_no_scatter_and_no_transposed_bank():
    """Catches a gradient by scatter, or by transposing the whole bank first."""
    x, w = normal(0, R, K), normal(1, E, K, N)

    def total(x, w):
        return jnp.square(grouped_matmul(x, w, SIZES, backend="xla")).sum()

    text = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(x, w))
    assert "scatter" not in text
    assert f"f32[{E},{N},{K}]" not in text


decoded: list[int] = []


def half_precision_expert(leaves):
    codes, scale = leaves
    jax.debug.callback(decoded.append, scale.astype(jnp.float32)[0])
    return codes.astype(jnp.float32) * scale


def test_only_experts_with_rows_are_decoded_and_once():
    """Catches decoding per row block, or of experts that nobody chose."""
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (4, K, N)), jnp.int8)
    scale = jnp.asarray([[1.0], [2.0], [3.0], [4.0]])
    sizes = jnp.asarray([100, 0, 1, 9], jnp.int32)
    x = normal(0, 110, K)
    decoded.clear()
    y = grouped_matmul_of(x, (codes, scale), half_precision_expert, sizes, columns=N)
    jax.effects_barrier()
    assert [float(value) for value in decoded] == [1.0, 3.0, 4.0]
    w = np.asarray(codes, np.float64) * np.asarray(scale)[:, :, None]
    np.testing.assert_allclose(y, oracle(x, w, sizes), rtol=1e-5, atol=1e-4)


def scaled_codes(leaves):
    codes, scale = leaves
    return codes.astype(jnp.float32) * scale


def test_gradient_of_float_leaves():
    """Catches a format whose scale gets no gradient, or the gradient of another expert."""
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (E, K, N)), jnp.int8)
    scale, x = normal(2, E, 1, N, dtype=jnp.bfloat16), normal(0, R, K)

    def total(x, scale, backend):
        leaves = (codes, scale)
        y = grouped_matmul_of(x, leaves, scaled_codes, SIZES, columns=N, backend=backend)
        return jnp.square(y).sum()

    got = jax.grad(total, (0, 1))(x, scale, "xla")
    want = jax.grad(total, (0, 1))(x, scale, "reference")
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-2)
    assert not np.any(np.float32(got[1])[1])  # no row, no gradient


def test_wrong_calls_say_what_is_wrong():
    """Catches shapes that broadcast into a wrong answer, and a misspelt backend that is ignored."""
    x, w = normal(0, R, K), normal(1, E, K, N)
    with pytest.raises(ValueError, match="K"):
        grouped_matmul(x[:, :-1], w, SIZES)
    with pytest.raises(ValueError, match=r"\[E, K, N\]"):
        grouped_matmul(x, w[0], SIZES)
    with pytest.raises(ValueError, match="unknown"):
        grouped_matmul(x, w, SIZES, backend="fast")
    with pytest.raises(ValueError, match="group_offset"):
        grouped_matmul(x, w, SIZES, group_offset=1, backend="ragged_dot")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("loops", [FAST_RUN, FAST_COMPILE])
def test_gradients_for_any_group_sizes(loops, data):
    """Catches a size class that drops or repeats rows of a group, or reads the next group's."""
    cuts = sorted(data.draw(st.integers(0, 150)) for _ in range(E))
    sizes = jnp.asarray(np.diff([0, *cuts]), jnp.int32)
    got, wanted = class_gradients(sizes, loops), class_gradients(sizes, "reference")
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@partial(jax.jit, static_argnums=1)
def class_gradients(sizes, backend):
    x, w = normal(0, 150, K), normal(1, E, K, N)
    return jax.grad(lambda x, w: loss(x, w, sizes, backend)[0], (0, 1))(x, w)


def test_fast_run_compiles_more_products_than_fast_compile():
    """Catches a choice that nothing reads."""
    assert len(class_heights(4096, 64, FAST_RUN)) > len(class_heights(4096, 64, FAST_COMPILE))
    assert class_heights(5, 3, FAST_RUN) == (5,)


@given(rows=st.integers(1, 10**6), groups=st.integers(1, 512))
def test_class_heights_fit(rows, groups):
    """Catches a product taller than the rows, and classes that do not rise."""
    heights = class_heights(rows, groups, FAST_RUN)
    assert heights[-1] <= rows and sorted(set(heights)) == list(heights)


@given(rows=st.integers(1, 10**6), groups=st.integers(1, 512))
def test_block_heights_fit(rows, groups):
    """Catches a block taller than the rows, which dynamic_slice refuses."""
    tall, short = block_heights(rows, groups)
    assert 1 <= short <= tall <= rows and tall <= 128
