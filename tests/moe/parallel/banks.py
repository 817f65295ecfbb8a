"""Banks of gated experts in every format of tests/weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.moe import GatedExperts, SiLU
from moejax.weights import Buckets, SharedBase, take
from tests.weights.contract import FORMATS, E, K, N, low_rank, packed, sparse, sum_of


def shared_base_of_buckets(lead, seed):
    """One base, and residuals in two formats."""
    base = np.random.default_rng(6).standard_normal((1, K, N)).astype("float32")
    first, exact = packed(2, 16, "uint8")(lead, seed)
    second, other = low_rank(lead, seed)
    residual = Buckets((take(first, slice(0, 2)), take(second, slice(2, E))))
    exact = np.concatenate([exact[:2], other[2:]]) + np.float64(base)
    return SharedBase(jnp.asarray(base), residual), exact


BUILDERS = {
    **dict(FORMATS),
    "shared_base_of_buckets": shared_base_of_buckets,
    "sum_with_sparse": sum_of(low_rank, sparse),
}


def halves(w):
    return Buckets((w[: E // 2], w[E // 2 :]))


def bank(name: str, rows: bool) -> GatedExperts:
    """The format's hidden units along its columns (gate and up), or along its rows (down)."""
    build = BUILDERS[name]
    draw = np.random.default_rng(8)
    plain = [draw.standard_normal((E, N, K)).astype("float32") for _ in range(2)]
    # All matrices of a bank have the same buckets.
    dense = [halves(jnp.asarray(w)) if "of_buckets" in name else jnp.asarray(w) for w in plain]
    of_format = [build((E,), seed)[0] for seed in range(3)]
    held = [*dense, of_format[2]] if rows else [*of_format[:2], dense[0]]
    width, hidden = (N, K) if rows else (K, N)
    experts = GatedExperts(E, width, hidden, SiLU(), 0.1, rngs=nnx.Rngs(0))
    for variable, w in zip((experts.gate, experts.up, experts.down), held, strict=True):
        variable.set_value(w)
    return experts
