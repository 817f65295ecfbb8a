"""What every strategy must pass on eight devices; a new one joins STRATEGIES.

`python -m tests.moe.parallel.contract` prints what it found as JSON; it needs eight devices.
"""

from __future__ import annotations

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.mesh import MeshSpec
from moejax.moe import (
    COMBINED,
    DISPATCHED,
    TED,
    Capacity,
    ChoiceCapacity,
    Dense,
    Dispatch,
    Dropless,
    ExpertsMove,
    GatedExperts,
    HierarchicalAllToAll,
    Local,
    PaddedAllToAll,
    Parallel,
    RaggedAllToAll,
    Ring,
    Routing,
    SiLU,
    Strategy,
)
from moejax.moe.parallel import routed
from moejax.weights import (
    Buckets,
    Codebook,
    LowRank,
    Packed,
    Sum,
    pack,
    pack_codebook,
    patch_rows,
    take,
)
from tests.moe.parallel.collectives import collectives

T, D, F, E, K = 21, 16, 32, 8, 2  # 8 devices do not divide 21 tokens

TWO_LEVELS = MeshSpec(data=2, node=2, expert=2)
WITH_FSDP = MeshSpec(fsdp=2, node=2, expert=2)
WITH_MODEL = MeshSpec(expert=4, model=2)
WITH_DATA = MeshSpec(data=2, expert=4)

STRATEGIES: dict[str, tuple[Strategy, MeshSpec]] = {
    "local": (Local(), WITH_MODEL),
    "ring": (Ring(), WITH_FSDP),
    "padded": (PaddedAllToAll(), WITH_FSDP),
    "padded, hidden cut": (PaddedAllToAll(), WITH_MODEL),
    "ragged": (RaggedAllToAll(), WITH_DATA),
    "hierarchical": (HierarchicalAllToAll(), TWO_LEVELS),
    "moving": (ExpertsMove(), WITH_FSDP),
    "ted": (TED(), WITH_MODEL),
    "ted, ragged": (TED(exchange=RaggedAllToAll()), WITH_MODEL),
}


QUICK = ("ring", "padded", "ragged", "hierarchical", "moving", "ted")


def dense_bank(seed: int = 0) -> GatedExperts:
    """Plain arrays and biases."""
    experts = GatedExperts(E, D, F, SiLU(), 0.3, bias=True, rngs=nnx.Rngs(seed))
    for i, name in enumerate(("gate_bias", "up_bias", "down_bias")):
        bias = getattr(experts, name)
        bias.set_value(0.1 * jax.random.normal(jax.random.key(i), bias.get_value().shape))
    return experts


def packed(seed: int, inputs: int, outputs: int, zero: bool = False) -> Packed:
    draw = np.random.default_rng(seed)
    codes = jnp.asarray(draw.integers(0, 16, (E, inputs, outputs)))
    scale = jnp.asarray(draw.uniform(0.02, 0.06, (E, inputs // 8, outputs)), jnp.float32)
    return pack(codes, scale, jnp.full(scale.shape, 7, jnp.uint8) if zero else None, 4, 8)


def coded(seed: int, inputs: int, outputs: int) -> Codebook:
    draw = np.random.default_rng(seed)
    codes = jnp.asarray(draw.integers(0, 16, (E, inputs, outputs)))
    scale = jnp.asarray(draw.uniform(0.1, 0.3, (E, inputs // 8, outputs)), jnp.float32)
    levels = jnp.asarray(draw.standard_normal((E, 16)), jnp.float32)
    return pack_codebook(codes, scale, levels, 4, 8)


def low_rank(seed: int, inputs: int, outputs: int) -> LowRank:
    draw = np.random.default_rng(seed)
    u, v = draw.standard_normal((E, inputs, 3)), draw.standard_normal((E, 3, outputs))
    return LowRank(jnp.asarray(0.2 * u, jnp.float32), jnp.asarray(0.2 * v, jnp.float32))


def holding(gate, up, down) -> GatedExperts:
    experts = dense_bank()
    for name, weight in {"gate": gate, "up": up, "down": down}.items():
        getattr(experts, name).set_value(weight)
    return experts


def halves(first, second) -> Buckets:
    """Experts 0 to 3 in one format, 4 to 7 in another."""
    return Buckets((first.take(slice(0, E // 2)), take(second, slice(E // 2, E))))


def bucket_bank() -> GatedExperts:
    """Every format at once, in two buckets per matrix; with biases."""
    plain = dense_bank(1)
    return holding(
        halves(packed(0, D, F), plain.gate.get_value()),
        halves(Sum((coded(1, D, F), low_rank(2, D, F))), low_rank(3, D, F)),
        halves(packed(4, F, D, zero=True), coded(5, F, D)),
    )


def mixed_bank() -> GatedExperts:
    """Formats that are not in buckets, some rows of one exact."""
    index = jnp.tile(jnp.asarray([1, 6]), (E, 1))
    gate = patch_rows(packed(0, D, F), index, 0.1 * jnp.ones((E, 2, F)))
    return holding(gate, Sum((packed(1, D, F), low_rank(2, D, F))), coded(5, F, D))


BANKS = {"every format in buckets": bucket_bank, "dense": dense_bank, "mixed": mixed_bank}
FIRST = next(iter(BANKS))


def loads() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (expert_TxK, valid_TxK)."""
    draw = np.random.default_rng(3)
    skewed = np.stack([draw.choice(E, K, False, p=np.arange(1, E + 1) / 36) for _ in range(T)])
    skewed[skewed == 2] = 4  # nobody goes to expert 2
    valid = np.ones((T, K), bool)
    padded = valid.copy()
    padded[-5:] = False
    padded[3, 1] = False
    one = np.full((T, K), 5)
    first_only = valid.copy()
    first_only[:, 1] = False
    spread = np.stack([draw.permutation(E)[:K] for _ in range(T)])
    return {
        "uneven, one expert without tokens": (skewed, valid),
        "one expert takes all": (one, first_only),
        "padding and choices taken back": (spread, padded),
    }


LOADS = loads()


def routing_of(expert_TxK, valid_TxK, gate_TxK) -> Routing:
    one = jnp.ones((T, E)) / E
    return Routing(
        token_A=jnp.repeat(jnp.arange(T, dtype=jnp.int32), K),
        expert_A=jnp.asarray(expert_TxK, jnp.int32).reshape(-1),
        gate_A=gate_TxK.reshape(-1),
        valid_A=jnp.asarray(valid_TxK).reshape(-1),
        logits_TxE=one,
        probabilities_TxE=one,
        per_token=K,
    )


def on_one_device(experts: GatedExperts, dispatch: Dispatch, x, routing: Routing):
    plan = dispatch.plan(routing, routing.expert_A, E)
    rows, _ = experts(plan.scatter(x), plan.group_sizes_E, frozenset())
    return plan.gather(rows), plan.dropped


def program(experts: GatedExperts, parallel: Parallel | None, dispatch: Dispatch):
    """(forward, forward and gradients), functions of floats, expert_TxK and valid_TxK."""
    graphdef, state = nnx.split(experts)
    leaves, tree = jax.tree.flatten(state)
    # Gradients of rows in bfloat16 are sums of rounded parts: no measure of a strategy.
    trains = [leaf.dtype == jnp.float32 for leaf in leaves]

    def forward(floats, x, gate_TxK, expert_TxK, valid_TxK):
        left = iter(floats)
        merged = [next(left) if t else leaf for t, leaf in zip(trains, leaves, strict=True)]
        bank = nnx.merge(graphdef, jax.tree.unflatten(tree, merged))
        routing = routing_of(expert_TxK, valid_TxK, gate_TxK)
        if parallel is None:
            return on_one_device(bank, dispatch, x, routing)
        return routed(parallel, bank, dispatch, x, routing, routing.expert_A, E)

    def loss(floats, x, gate_TxK, expert_TxK, valid_TxK):
        y, dropped = forward(floats, x, gate_TxK, expert_TxK, valid_TxK)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(D))), (y, dropped)

    floats = [leaf for leaf, t in zip(leaves, trains, strict=True) if t]
    x = jax.random.normal(jax.random.key(7), (T, D))
    gate_TxK = jax.random.uniform(jax.random.key(8), (T, K))
    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    return jax.jit(forward), both, (floats, x, gate_TxK)


def distance(found, expected) -> float:
    """Largest difference of any array, relative to its largest value where that is above 1."""
    return max(
        float(np.abs(np.float64(f) - np.float64(e)).max() / max(1.0, np.abs(np.float64(e)).max()))
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@functools.cache
def expected(bank: str, load: str, dispatch: Dispatch):
    _, both, arguments = program(BANKS[bank](), None, dispatch)
    return jax.device_get(both(*arguments, *LOADS[load]))


def equalities(name: str, bank: str) -> dict[str, float]:
    """Load -> distance of outputs and gradients from those of dense computation on one device."""
    strategy, mesh = STRATEGIES[name]
    _, both, arguments = program(BANKS[bank](), Parallel(mesh.build(), strategy), Dropless())
    found = {}
    for load, choices in LOADS.items():
        mine = jax.device_get(both(*arguments, *choices))
        found[load] = distance(mine, expected(bank, load, Dense()))
    return found


def traffic(name: str, platform: str) -> dict[str, list]:
    """Collectives of the forward pass, and of forward and backward, before any compiler pass."""
    strategy, mesh = STRATEGIES[name]
    forward, both, arguments = program(dense_bank(), Parallel(mesh.build(), strategy), Dropless())
    choices = next(iter(LOADS.values()))
    return {
        way: collectives(f.trace(*arguments, *choices).lower(lowering_platforms=(platform,)), mesh)
        for way, f in (("forward", forward), ("both", both))
    }


def rematerialised() -> dict[str, list]:
    """Collectives of forward and backward where nothing is kept, and where exchanged rows are."""
    strategy, mesh = STRATEGIES["hierarchical"]
    forward, _, arguments = program(dense_bank(), Parallel(mesh.build(), strategy), Dropless())
    choices = next(iter(LOADS.values()))
    found = {}
    for name, policy in {
        "nothing": None,
        "rows": jax.checkpoint_policies.save_only_these_names(DISPATCHED, COMBINED),
    }.items():
        again = jax.checkpoint(lambda *given: forward(*given)[0], policy=policy)
        gradient = jax.jit(jax.grad(lambda *given, f=again: jnp.sum(jnp.sin(f(*given))), (0, 1, 2)))
        found[name] = collectives(gradient.trace(*arguments, *choices).lower(), mesh)
    return found


def drops() -> dict[str, dict]:
    """What is left out where room is short, beside what one device leaves out."""
    found = {}
    mesh = WITH_FSDP.build()
    load = LOADS["uneven, one expert without tokens"]
    for dispatch in (Capacity(factor=0.6), ChoiceCapacity(factor=0.6, least=2)):
        forward, _, arguments = program(dense_bank(), Parallel(mesh, PaddedAllToAll()), dispatch)
        alone, _, _ = program(dense_bank(), None, dispatch)
        y, dropped = forward(*arguments, *load)
        expected_y, expected_dropped = alone(*arguments, *load)
        found[type(dispatch).__name__] = {
            "distance": distance(y, expected_y),
            "dropped": int(dropped),
            "expected": int(expected_dropped),
        }
    for strategy in (PaddedAllToAll(factor=0.8), RaggedAllToAll(factor=0.8)):
        forward, _, arguments = program(dense_bank(), Parallel(mesh, strategy), Dropless())
        kept_TxK = kept(strategy, load[0])
        alone, _, _ = program(dense_bank(), None, Dropless())
        y, dropped = forward(*arguments, *load)
        found[type(strategy).__name__] = {
            "distance": distance(y, alone(*arguments, load[0], kept_TxK)[0]),
            "dropped": int(dropped),
            "expected": int((~kept_TxK).sum()),
        }
    return found


def kept(strategy: Strategy, expert_TxK: np.ndarray) -> np.ndarray:
    """Which choices find room on WITH_FSDP, one after another, as the docstrings say."""
    kept_TxK = np.ones(expert_TxK.shape, bool)
    per_device, devices = -(-T // 8), 4
    A = per_device * K
    taken: dict[tuple, int] = {}
    for t, k in np.ndindex(expert_TxK.shape):
        source, target = t // per_device, expert_TxK[t, k] // (E // devices)
        # Each of the two fsdp rows of devices has the whole bank.
        row = source // devices
        block = (source, target) if isinstance(strategy, PaddedAllToAll) else (row, target)
        room = math.ceil(0.8 * A / devices if isinstance(strategy, PaddedAllToAll) else 0.8 * A)
        kept_TxK[t, k] = taken.get(block, 0) < room
        taken[block] = taken.get(block, 0) + 1
    return kept_TxK


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    everything = [(name, bank) for bank in BANKS for name in STRATEGIES]
    chosen = everything if "--all" in sys.argv else [(name, FIRST) for name in QUICK]
    report = {
        "equal": {f"{name}, {bank}": equalities(name, bank) for name, bank in chosen},
        "traffic": {n: traffic(n, "cpu") for n in STRATEGIES if "ragged" not in n}
        | {n: traffic(n, "tpu") for n in STRATEGIES if "ragged" in n},
        "rematerialised": rematerialised(),
        "drops": drops(),
    }
    json.dump(report, sys.stdout)
