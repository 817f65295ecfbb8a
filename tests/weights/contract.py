"""The formats that the contract test runs over; every later format joins here.

A builder takes the leading axes and a seed and returns the weight [*lead, K, N] with its value in
float64, computed by numpy from the formula in the format's docstring. lead ends with E = 4.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from moejax.weights import (
    Buckets,
    Codebook,
    DictionaryCoded,
    LowRank,
    RowPatch,
    SharedBase,
    Sum,
    Ternary,
    TernaryRows,
    Transposed,
    encode,
    pack,
    pack_codebook,
    pack_nm,
    pack_sparse,
    patch_rows,
)

E, K, N = 4, 32, 6
Builder = Callable[[tuple[int, ...], int], tuple]


def _float(generator, *shape, dtype="float32"):
    return generator.standard_normal(shape).astype(dtype)


def dense(lead, seed):
    w = _float(np.random.default_rng(seed), *lead, K, N)
    return jnp.asarray(w), np.float64(w)


def packed(bits, group, zero_dtype, scale_dtype="float16"):
    def build(lead, seed):
        generator = np.random.default_rng(seed)
        codes = generator.integers(0, 2**bits, (*lead, K, N))
        scale = _float(generator, *lead, K // group, N, dtype=scale_dtype)
        zero, shift = None, np.float64(2 ** (bits - 1))
        if zero_dtype:
            zero = generator.uniform(0, 2**bits - 1, scale.shape).astype(zero_dtype)
            shift = np.repeat(np.float64(zero), group, axis=-2)
            zero = jnp.asarray(zero)
        exact = (codes - shift) * np.repeat(np.float64(scale), group, axis=-2)
        return pack(jnp.asarray(codes), jnp.asarray(scale), zero, bits, group), exact

    return build


def codebook(lead, seed) -> tuple[Codebook, np.ndarray]:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16, (*lead, K, N))
    scale = _float(generator, *lead, K // 8, N, dtype="float16")
    levels = _float(generator, *lead, 16)
    exact = np.take_along_axis(np.float64(levels)[..., None], codes, axis=-2)
    exact = exact * np.repeat(np.float64(scale), 8, axis=-2)
    leaves = (jnp.asarray(codes), jnp.asarray(scale), jnp.asarray(levels))
    return pack_codebook(*leaves, bits=4, group=8), exact


def low_rank(lead, seed) -> tuple[LowRank, np.ndarray]:
    generator = np.random.default_rng(seed)
    u = _float(generator, *lead, K, 3, dtype="float16")
    v = _float(generator, *lead, 3, N, dtype="float16")
    return LowRank(jnp.asarray(u), jnp.asarray(v)), np.float64(u) @ np.float64(v)


def sum_of(*builders):
    def build(lead, seed):
        parts = [builder(lead, seed + i) for i, builder in enumerate(builders)]
        return Sum(tuple(w for w, _ in parts)), sum(exact for _, exact in parts)

    return build


def buckets(lead, seed) -> tuple[Buckets, np.ndarray]:
    *front, experts = lead
    sizes = (1, 1, experts - 2)
    builders = (packed(2, 32, "uint8"), dense, sum_of(packed(3, 16, None), dense))
    parts = [b((*front, n), seed + i) for i, (b, n) in enumerate(zip(builders, sizes, strict=True))]
    exact = np.concatenate([exact for _, exact in parts], axis=-3)
    return Buckets(tuple(w for w, _ in parts)), exact


def row_patch(base: Builder):
    def build(lead, seed) -> tuple[RowPatch, np.ndarray]:
        generator = np.random.default_rng(seed + 100)
        w, exact = base(lead, seed)
        index = np.argsort(generator.random((*lead, K)), axis=-1)[..., :3]
        rows = jnp.asarray(_float(generator, *lead, 3, N), jnp.bfloat16)
        exact = np.array(exact)
        np.put_along_axis(exact, index[..., None], np.float64(rows), axis=-2)
        return patch_rows(w, jnp.asarray(index), rows), exact

    return build


def sparse(lead, seed):
    """37 weights of each matrix, anywhere; bfloat16 holds them exactly."""
    generator = np.random.default_rng(seed)
    w = jnp.asarray(_float(generator, *lead, K, N), jnp.bfloat16)
    rank = np.argsort(np.argsort(generator.random((*lead, K * N)), axis=-1), axis=-1)
    kept = (rank < 37).reshape(*lead, K, N)
    return pack_sparse(w, jnp.asarray(kept), 37), np.where(kept, np.float64(w), 0)


def n_of_m(n, m):
    def build(lead, seed):
        generator = np.random.default_rng(seed)
        w = jnp.asarray(_float(generator, *lead, K, N), jnp.bfloat16)
        draws = generator.random((*lead, K // m, m, N))
        kept = (np.argsort(np.argsort(draws, axis=-2), axis=-2) < n).reshape(w.shape)
        return pack_nm(w, jnp.asarray(kept), n, m), np.where(kept, np.float64(w), 0)

    return build


def transposed(lead, seed) -> tuple[Transposed, np.ndarray]:
    generator = np.random.default_rng(seed)
    v = jnp.asarray(_float(generator, *lead, 3, K, dtype="float16"))
    u = jnp.asarray(_float(generator, *lead, N, 3, dtype="float16"))
    return Transposed(LowRank(u, v)), np.swapaxes(np.float64(u) @ np.float64(v), -1, -2)


def packed_factors(lead, seed) -> tuple[LowRank, np.ndarray]:
    u, left = packed(3, 16, "uint8")(lead, seed)
    generator = np.random.default_rng(seed + 50)
    codes = generator.integers(0, 4, (*lead, 16, N))
    scale = _float(generator, *lead, 1, N, dtype="float16")
    right = (codes - np.float64(2)) * np.float64(scale)
    v = Transposed(Transposed(pack(jnp.asarray(codes), jnp.asarray(scale), None, 2, 16)))
    widened = LowRank(u, jnp.full((*lead, N, 16), 0.25, jnp.float16))
    return LowRank(widened, v), left @ np.full((*lead, N, 16), 0.25) @ right


def _ternary_parts(lead, seed):
    generator = np.random.default_rng(seed)
    codes = generator.choice(3, size=(*lead, K, N), p=(0.8, 0.1, 0.1))
    low, high = (-np.abs(_float(generator, *lead, 1, N, dtype="float16")) for _ in range(2))
    exact = np.where(codes == 1, -np.float64(high), np.where(codes == 2, np.float64(low), 0))
    leaves = (jnp.asarray(codes), jnp.asarray(-high), jnp.asarray(low))
    return TernaryRows().pack(*leaves), exact


def ternary(lead, seed) -> tuple[Ternary, np.ndarray]:
    return _ternary_parts(lead, seed)


def dictionary(lead, seed) -> tuple[DictionaryCoded, np.ndarray]:
    """Filled up to the most codewords that there could be: all of one length, whatever the seed."""
    w, exact = _ternary_parts(lead, seed)
    coded = encode(w)
    missing = K // 2 * N - coded.codes.shape[-1]
    fill = [(0, 0)] * len(lead) + [(0, missing)]
    return DictionaryCoded(jnp.pad(coded.codes, fill), coded.low, coded.high, K), exact


def shared_base(residual: Builder):
    def build(lead, seed) -> tuple[SharedBase, np.ndarray]:
        *front, _ = lead
        # One base whatever the seed: only experts of one base can be joined.
        base = jnp.asarray(_float(np.random.default_rng(5), *front, 1, K, N), jnp.bfloat16)
        w, exact = residual(lead, seed)
        return SharedBase(base, w), np.float64(base) + exact

    return build


FORMATS: list[tuple[str, Builder]] = [
    ("dense", dense),
    ("packed_2_symmetric", packed(2, 16, None)),
    ("packed_3_asymmetric", packed(3, 8, "uint8")),
    ("packed_8_float_zero", packed(8, K, "float16", "float32")),
    ("codebook", codebook),
    ("low_rank", low_rank),
    ("sum", sum_of(packed(3, 16, None), low_rank)),
    ("buckets", buckets),
    ("sparse", sparse),
    ("sparse_2_of_4", n_of_m(2, 4)),
    ("sparse_8_of_16", n_of_m(8, 16)),
    ("transposed", transposed),
    ("sum_of_packed_factors", sum_of(packed(3, 16, None), packed_factors)),
    ("ternary", ternary),
    ("dictionary", dictionary),
    ("shared_base", shared_base(low_rank)),
    ("shared_base_of_codes", shared_base(packed(2, 16, "uint8"))),
    ("row_patch", row_patch(packed(2, 16, "uint8"))),
    ("row_patch_of_sum", row_patch(sum_of(packed(3, 16, None), low_rank))),
]
