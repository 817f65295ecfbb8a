"""The quantized grouped matmul against a float64 oracle: portable path, TPU kernel, gradients."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from moejax_kernels.grouped_matmul.tiles import Tiles
from moejax_kernels.lowrank_grouped_matmul import lowrank_grouped_matmul
from moejax_kernels.quantized_grouped_matmul import (
    pack_codes,
    pallas_tpu,
    planes,
    quantized_grouped_matmul,
    unpack_codes,
)
from moejax_kernels.quantized_grouped_matmul import pallas_tpu_prefill as prefill
from moejax_kernels.quantized_grouped_matmul.api import tpu_kernel
from moejax_kernels.quantized_grouped_matmul.reference import Leaves

E = 3


class Bank(NamedTuple):
    """Random experts: what the op takes, and the codes it was packed from."""

    codes: np.ndarray
    words: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    addend: tuple[jax.Array, jax.Array] | None

    def matrices(self):
        """float64 [E, K, N] without the addend, from the definition."""
        inputs, groups = self.codes.shape[1], self.scale.shape[1]
        repeat = partial(np.repeat, repeats=inputs // groups, axis=1)
        return (self.codes - repeat(np.float64(self.middle))) * repeat(np.float64(self.scale))

    @property
    def middle(self):
        """What is taken from each code."""
        if self.zero is not None:
            return self.zero
        return np.full(self.scale.shape, 2 ** (int(self.codes.max()).bit_length() - 1))


def bank(bits, inputs, columns, group, zero=None, rank=0, scale="float16", seed=0):
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**bits, (E, inputs, columns))
    codes[:, 0] = 2**bits - 1  # the middle is told from the largest code
    shape = (E, inputs // group, columns)
    return Bank(
        codes,
        pack_codes(jnp.asarray(codes), bits),
        jnp.asarray(generator.uniform(0.5, 1.5, shape), scale),
        None if zero is None else jnp.asarray(generator.integers(0, 2**bits, shape), zero),
        (
            jnp.asarray(generator.standard_normal((E, inputs, rank)), jnp.bfloat16),
            jnp.asarray(generator.standard_normal((E, rank, columns)), jnp.bfloat16),
        )
        if rank
        else None,
    )


def normal(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def product(x, w, sizes, offset=0):
    """float64 y[r] = x[r] @ w[group(r) - offset], zero where there is no such expert."""
    x, y, row = np.float64(x), np.zeros((len(x), w.shape[2])), 0
    for group, size in enumerate(np.asarray(sizes)):
        if 0 <= group - offset < len(w):
            y[row : row + size] = x[row : row + size] @ w[group - offset]
        row += size
    return y


def oracle(x, experts, sizes, offset=0):
    y = product(x, experts.matrices(), sizes, offset)
    if experts.addend is not None:
        u, v = (np.float64(factor) for factor in experts.addend)
        y += product(x, u @ v, sizes, offset)
    return y


def kernel(x, experts, sizes, offset=0, **options):
    """The TPU kernel, interpreted."""
    leaves = Leaves(*experts[1:4], *(experts.addend or (None, None)))
    return interpreted(tuple(sorted(options.items())))(x, leaves, sizes, offset)


@lru_cache
def interpreted(options):
    return jax.jit(partial(pallas_tpu.forward, **dict(options), interpret=True))


def close(y, exact, tolerance):
    np.testing.assert_allclose(np.float64(y), exact, rtol=0, atol=tolerance * np.abs(exact).max())


SIZES = jnp.asarray([5, 0, 11], jnp.int32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_order_of_planes(bits):
    """Catches a code taken for its neighbour, or a mantissa whose offset is another."""
    inputs = planes.chunk_inputs(bits)
    codes = np.random.default_rng(0).integers(0, 2**bits, (inputs, 128))
    words = pack_codes(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(unpack_codes(words, bits), codes)
    for dtype in ("int8", "bfloat16"):

        def body(words_ref, out_ref, dtype=dtype):
            out_ref[...] = planes.operand(words_ref[...], bits, dtype).astype(jnp.float32)

        shape = jax.ShapeDtypeStruct((inputs, 128), jnp.float32)
        values = pl.pallas_call(body, out_shape=shape, interpret=True)(words)
        order = planes.order(bits, dtype)
        np.testing.assert_array_equal(np.sort(order.inputs), np.arange(inputs))
        np.testing.assert_array_equal(values - order.offset[:, None], codes[order.inputs])


GROUPS = {1: 256, 2: 32, 3: 128, 4: 64, 5: 64, 6: 256, 7: 32, 8: 128}


SLOW = [pytest.param(bits, marks=pytest.mark.slow) for bits in (5, 7)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8, *SLOW])
def test_kernel_is_exact(bits):
    """Catches lost low bits of float32 rows, scales or zeros, and groups mixed in one product."""
    zero = "uint8" if bits % 2 else None
    experts = bank(bits, 256, 128, GROUPS[bits], zero, rank=4 if bits > 5 else 0)
    x = normal(18, 256)
    close(kernel(x, experts, SIZES, bits=bits), oracle(x, experts, SIZES), 2e-5)


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 8), (3, 16), (8, 16), (2, 24)])
def test_integer_activations(bits, activation_bits):
    """Catches digits of x weighed wrongly, and rounding coarser than a step per row."""
    experts = bank(bits, 256, 128, 128, "uint8" if bits == 4 else None, rank=2)
    x = normal(18, 256).at[:, 0].multiply(8)
    options = {"bits": bits, "activation_bits": activation_bits}
    y = kernel(x, experts, SIZES, **options)
    same = quantized_grouped_matmul(
        x, *experts[1:4], SIZES, addend=experts.addend, backend="reference", **options
    )
    close(y, np.float64(same), 2e-5)
    step = (
        np.abs(x).max(1, keepdims=True) / {8: 127, 16: 127 * 257, 24: 127 * 65793}[activation_bits]
    )
    # Rounding errors are independent, half a step at most: six standard deviations of their sum.
    spread = np.sqrt((experts.matrices() ** 2).sum(1).max()) * step / np.sqrt(12)
    assert (np.abs(y - oracle(x, experts, SIZES)) < 6 * spread + 1e-3).all()
    assert np.abs(y - oracle(x, experts, SIZES)).max() > 1e-4 * (activation_bits == 8)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernel_takes_any_group_sizes(data):
    """Catches rows of a block that spill over the next expert's, and tiny, empty or lost groups."""
    rows = 40
    cuts = sorted(data.draw(st.integers(0, rows)) for _ in range(4))
    sizes = np.diff([0, *cuts]).astype(np.int32)
    offset = data.draw(st.integers(-1, 4))
    experts, x = bank(4, 128, 128, 128), normal(rows, 128).at[cuts[-1] :].set(jnp.nan)
    y = kernel(x, experts, jnp.asarray(sizes), jnp.int32(offset), bits=4)
    close(y, oracle(x[: cuts[-1]], experts, sizes, offset), 2e-5) if cuts[-1] == rows else None
    held = np.nan_to_num(np.asarray(x))
    np.testing.assert_allclose(y, oracle(held, experts, sizes, offset), rtol=0, atol=5e-3)


@pytest.mark.parametrize("trip", [128, 256])
def test_kernel_in_trips_and_tall_blocks(trip):
    """Catches a loop over inputs that takes the scales or the words of its first trip again."""
    experts, x = bank(4, 512, 256, 512 if trip == 256 else 128), normal(30, 512, dtype="bfloat16")
    tiles = pallas_tpu.Tiling(rows=16, columns=128, depth=128, trip=trip)
    y = kernel(x, experts, jnp.asarray([2, 27, 1]), bits=4, tiles=tiles)
    assert y.dtype == jnp.bfloat16
    close(y, oracle(x, experts, [2, 27, 1]), 5e-3)


PREFILL_TILES = Tiles(256, 128, (32, 16), 100, 128, 1, 16 << 20)
MORE = [
    pytest.param(*case, marks=pytest.mark.slow) for case in [(8, None, 256, 0), (5, None, 32, 0)]
]


@pytest.mark.parametrize(
    ("bits", "zero", "group", "rank"), [(4, "uint8", 128, 3), (3, None, 32, 0), *MORE]
)
def test_prefill_kernel_and_dx(bits, zero, group, rank):
    """Catches inputs in another order than their planes, a group's scale on its neighbour, a slice
    that overlaps the one before it decoded at the wrong place, and a stale slice of the last group.
    """
    experts = bank(bits, 256, 384 if bits == 4 else 128, group, zero, rank)
    leaves = Leaves(*experts[1:4], *(experts.addend or (None, None)))
    x, dy = normal(45, 256), normal(45, experts.words.shape[2], seed=2)
    sizes = jnp.asarray([3, 0, 7, 33], jnp.int32)  # the first group is not ours
    turned = prefill.whole_chunks(PREFILL_TILES, bits, 256, True)

    @jax.jit
    def both(x, dy, leaves):
        at, options = (sizes, 1), {"bits": bits}
        y = prefill.forward(x, leaves, *at, tiles=PREFILL_TILES, **options)
        return y, prefill.forward(dy, leaves, *at, tiles=turned, transposed=True, **options)

    with pltpu.force_tpu_interpret_mode():
        y, dx = both(x, dy, leaves)
    w = experts.matrices()
    if rank:
        u, v = (np.float64(factor) for factor in experts.addend)
        w = w + u @ v
    close(y, product(x, w, sizes, 1), 1e-5)
    close(dx, product(dy, w.swapaxes(1, 2), sizes, 1), 1e-5)


def test_many_rows_decode_once_and_few_multiply_codes():
    """Catches a large row count that falls back to loops, and a decode that unpacks whole experts.

    Shapes alone decide: 64 MiB of rows do not fit beside the bank.
    """
    array: Any = jax.ShapeDtypeStruct
    leaves = Leaves(
        array((8, 512, 2048), jnp.uint32), array((8, 32, 2048), jnp.float16), None, None, None
    )
    sizes = array((8,), jnp.int32)
    few, many = (array((rows, 4096), jnp.bfloat16) for rows in (64, 8192))
    assert tpu_kernel(few, leaves, sizes, 4) is pallas_tpu.forward
    assert tpu_kernel(many, leaves, sizes, 4) is prefill.forward
    odd = leaves._replace(words=array((8, 512, 200), jnp.uint32))
    assert tpu_kernel(many, odd, sizes, 4) is None


@pytest.mark.parametrize("zero", [None, "uint8", "float16"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_portable_path_and_gradients(zero, backend):
    """Catches a scale, zero or factor without gradient, and dx through other weights."""
    experts = bank(3, 64, 24, 32, zero, rank=2, scale="float32")
    x, offset = normal(18, 64), 1
    floats = {"scale": experts.scale, "addend": experts.addend}
    floats |= {"zero": experts.zero} if zero == "float16" else {}

    def loss(x, floats, backend):
        fixed = {"zero": experts.zero} | floats
        scale, zero, addend = fixed["scale"], fixed["zero"], fixed["addend"]
        y = quantized_grouped_matmul(
            x, experts.words, scale, zero, SIZES, bits=3, group_offset=offset, addend=addend,
            backend=backend,
        )  # fmt: skip
        return jnp.square(y).sum(), y

    (_, y), (dx, dfloats) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, floats, backend)
    exact = oracle(x, experts, SIZES, offset)
    close(y, exact, 1e-5)
    u, v = (np.float64(factor) for factor in experts.addend)
    w = experts.matrices() + u @ v
    close(dx, product(2 * exact, w.swapaxes(1, 2), SIZES, offset), 1e-4)
    want = jax.grad(loss, 1, has_aux=True)(x, floats, "reference")[0]
    for got, other in zip(jax.tree.leaves(dfloats), jax.tree.leaves(want), strict=True):
        assert got.dtype == other.dtype
        close(got, np.float64(other), 1e-2)


def test_scan_over_layers_and_shard_map():
    """Catches an op that wants static sizes, or stacked banks, or loses its offset on a mesh."""
    first, second = (bank(4, 32, 32, 32, seed=seed) for seed in (0, 1))
    x = normal(16, 32)

    def layer(x, leaves):
        return quantized_grouped_matmul(x, *leaves, None, SIZES, bits=4) / 50, None

    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), first[1:3], second[1:3])
    y = jax.jit(lambda x: jax.lax.scan(layer, x, stacked)[0])(x)
    close(y, oracle(oracle(x, first, SIZES) / 50, second, SIZES) / 50, 1e-5)

    def shard(x, words, scale, sizes):
        offset = jax.lax.axis_index("e") * E
        y = quantized_grouped_matmul(x, words, scale, None, sizes, bits=4, group_offset=offset)
        return jax.lax.psum(y, "e")

    mesh = jax.make_mesh((1,), ("e",), axis_types=(jax.sharding.AxisType.Auto,))
    experts, whole = PartitionSpec("e"), PartitionSpec()
    specs = (whole, experts, experts, whole)
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=whole)
    close(jax.jit(sharded)(x, *first[1:3], SIZES), oracle(x, first, SIZES), 1e-5)
    dx = jax.jit(jax.grad(lambda x: sharded(x, *first[1:3], SIZES).sum()))(x)
    close(dx, product(np.ones((16, 32)), first.matrices().swapaxes(1, 2), SIZES), 1e-5)


def test_low_rank_experts():
    """Catches factors in the wrong order, and x @ u rounded to bfloat16 on the way."""
    u, v = normal(E, 16, 2, seed=2), normal(E, 2, 8, seed=3)
    x = normal(18, 16, dtype="bfloat16")
    exact = product(x, np.float64(u) @ np.float64(v), SIZES, 1)
    for backend in (None, "xla", "reference"):
        y = lowrank_grouped_matmul(x, u, v, SIZES, group_offset=1, backend=backend)
        np.testing.assert_allclose(np.float64(y), exact, rtol=2**-8, atol=1e-6)
    with pytest.raises(ValueError, match="factors"):
        lowrank_grouped_matmul(x, v, u, SIZES)


def test_wrong_calls_say_what_is_wrong():
    """Catches shapes that broadcast into a wrong answer, and a backend that cannot take them."""
    experts, x = bank(3, 64, 24, 32), normal(18, 64)
    good: dict[str, Any] = {"words": experts.words, "scale": experts.scale, "zero": None}
    good |= {"group_sizes_G": SIZES, "bits": 3}
    for wrong, says in (
        ({"bits": 9}, "bits = 9"),
        ({"words": experts.words[:, :-3]}, "disagree on K"),
        ({"words": experts.words.astype(jnp.int32)}, "uint32"),
        ({"scale": experts.scale[:, :, :-1]}, "scale has shape"),
        ({"scale": jnp.ones((E, 3, 24))}, "3 groups"),
        ({"zero": experts.scale[:, :1]}, "zero has shape"),
        ({"addend": (x[None], x[None])}, "addend"),
        ({"activation_bits": 4}, "activation_bits = 4"),
        ({"backend": "fast"}, "unknown"),
        ({"backend": "pallas_tpu"}, "columns in 128s"),
    ):
        with pytest.raises(ValueError, match=says):
            quantized_grouped_matmul(x, **good | wrong)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_compiles_for_every_tpu(chip):
    """Catches a kernel that only the interpreter takes."""
    pytest.importorskip("libtpu")
    aot = pytest.importorskip("moejax_kernels.aot")

    def program(bits, zero, rank, activation_bits):
        experts = bank(bits, 256, 256, 128, zero, rank)

        def call(x, words, scale, zero, addend, sizes):
            return quantized_grouped_matmul(
                x, words, scale, zero, sizes, bits=bits, addend=addend,
                activation_bits=activation_bits, backend="pallas_tpu",
            )  # fmt: skip

        arrays = (normal(16, 256, dtype="bfloat16"), *experts[1:], SIZES)
        return aot.Program(
            call, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
        )

    options = [(4, "uint8", 0, None), (3, None, 8, 24), (8, None, 0, 8)]
    programs = {str(o): program(*o) for o in options}
    experts = bank(3, 256, 256, 128, "uint8", rank=8)

    def loss(x, words, scale, zero, addend, sizes):
        y = quantized_grouped_matmul(x, words, scale, zero, sizes, bits=3, addend=addend)
        return y.astype(jnp.float32).sum()

    arrays = (normal(400, 256, dtype="bfloat16"), *experts[1:], SIZES)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    programs["prefill"] = aot.Program(jax.value_and_grad(loss), abstract)
    reports = aot.compile_all(programs, chip=chip)
    both = [name for name in reports.pop("prefill").dumps if name.startswith("grouped_matmul")]
    assert len(both) == 2  # the product and dx
    assert all(report.kernel("quantized_grouped_matmul").root for report in reports.values())
