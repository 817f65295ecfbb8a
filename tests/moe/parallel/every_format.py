"""Banks in every format of tests/weights on eight devices; prints JSON.

`python -m tests.moe.parallel.every_format MESH`, for a name of `MESHES`.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.core import SpecError
from moejax.mesh import MeshSpec
from moejax.moe import Dropless, GatedExperts, PaddedAllToAll, Parallel, Routing, SiLU
from moejax.moe.parallel import routed
from moejax.moe.parallel.bank import cuts, device_order
from moejax.weights import Buckets, SharedBase, take
from tests.weights.contract import FORMATS, E, K, N, low_rank, packed, sparse, sum_of

T, CHOICES = 13, 2
MESHES = {
    "experts": MeshSpec(fsdp=2, node=2, expert=2),
    "hidden units": MeshSpec(data=2, expert=2, model=2),
}


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


def bank(name: str, rows: bool) -> tuple[GatedExperts, list[np.ndarray]]:
    """The format's hidden units along its columns (gate and up), or along its rows (down)."""
    build = BUILDERS[name]
    draw = np.random.default_rng(8)
    plain = [draw.standard_normal((E, N, K)).astype("float32") for _ in range(2)]
    # All matrices of a bank have the same buckets.
    dense = [halves(jnp.asarray(w)) if "of_buckets" in name else jnp.asarray(w) for w in plain]
    if rows:
        w, exact = build((E,), 2)
        held, values = [*dense, w], [*plain, exact]
    else:
        (gate, left), (up, right) = build((E,), 0), build((E,), 1)
        held, values = [gate, up, dense[0]], [left, right, plain[0]]
    width, hidden = (N, K) if rows else (K, N)
    experts = GatedExperts(E, width, hidden, SiLU(), 0.1, rngs=nnx.Rngs(0))
    for variable, w in zip((experts.gate, experts.up, experts.down), held, strict=True):
        variable.set_value(w)
    return experts, [np.float64(w) for w in values]


def routing() -> Routing:
    draw = np.random.default_rng(4)
    expert_TxK = np.stack([draw.permutation(E)[:CHOICES] for _ in range(T)])
    gate_TxK = draw.uniform(0.2, 1, (T, CHOICES)).astype("float32")
    one = jnp.ones((T, E)) / E
    return Routing(
        token_A=jnp.repeat(jnp.arange(T, dtype=jnp.int32), CHOICES),
        expert_A=jnp.asarray(expert_TxK.reshape(-1), jnp.int32),
        gate_A=jnp.asarray(gate_TxK.reshape(-1)),
        valid_A=jnp.ones(T * CHOICES, bool),
        logits_TxE=one,
        probabilities_TxE=one,
        per_token=CHOICES,
    )


def by_hand(values: list[np.ndarray], x_TxD: np.ndarray, chosen: Routing) -> np.ndarray:
    """float64 y_TxD, one assignment after another."""
    gate, up, down = values
    y_TxD = np.zeros(x_TxD.shape)
    parts = (np.asarray(a) for a in (chosen.token_A, chosen.expert_A, chosen.gate_A))
    for t, e, g in zip(*parts, strict=True):
        h = np.float64(x_TxD[t]) @ gate[e]
        silu = h / 2 * (1 + np.tanh(h / 2))
        y_TxD[t] += g * ((silu * (np.float64(x_TxD[t]) @ up[e])) @ down[e])
    return y_TxD


def refusal(experts: GatedExperts, parallel: Parallel) -> str | None:
    """The axis of the mesh that the bank does not fit."""
    try:
        cuts(experts, parallel)
        device_order(experts, parallel.mesh.shape["node"] * parallel.mesh.shape["expert"])
    except SpecError as error:
        return error.field
    return None


def found_on(mesh: MeshSpec) -> dict[str, float | str | None]:
    """Bank -> relative distance from the sums by hand, or the axis that does not fit it."""
    parallel, chosen = Parallel(mesh.build(), PaddedAllToAll()), routing()
    banks = {
        f"{name}, {'rows' if rows else 'columns'}": bank(name, rows)
        for name in BUILDERS
        for rows in (False, True)
    }
    report: dict = {name: refusal(experts, parallel) for name, (experts, _) in banks.items()}
    fit = {name: made for name, made in banks.items() if report[name] is None}
    parts = {name: nnx.split(experts) for name, (experts, _) in fit.items()}
    draw = np.random.default_rng(3)
    wide, narrow = (draw.standard_normal((T, n)).astype("float32") for n in (K, N))
    x = {name: wide if "columns" in name else narrow for name in fit}

    @jax.jit
    def together(states, x):
        return {
            name: routed(
                parallel,
                nnx.merge(parts[name][0], state),
                Dropless(),
                x[name],
                chosen,
                chosen.expert_A,
                E,
            )[0]
            for name, state in states.items()
        }

    y = jax.device_get(together({name: state for name, (_, state) in parts.items()}, x))
    for name, (_, values) in fit.items():
        expected = by_hand(values, x[name], chosen)
        report[name] = float(np.abs(y[name] - expected).max() / np.abs(expected).max())
    return report


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    json.dump(found_on(MESHES[sys.argv[1]]), sys.stdout)
