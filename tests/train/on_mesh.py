"""Training on eight emulated devices, as JSON: `python -m tests.train.on_mesh FOLDER`.

Small steps with plain gradient descent, so that what is compared is gradients and not their signs.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moejax.checkpoint import TrainCheckpoints
from moejax.evaluate import evaluate
from moejax.mesh import MeshSpec, Rules
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    KeepDispatch,
    KeepNothing,
    LayerSpec,
    ModelSpec,
    combine,
    forward,
)
from moejax.moe import (
    TED,
    BiasedTopK,
    Local,
    MoESpec,
    PaddedAllToAll,
    Parallel,
    Ring,
    RouterSpec,
    RouterZLoss,
    SigmoidGates,
    TopKLoadBalance,
)
from moejax.train import AdamW, TrainState, start, start_on_mesh, train_step
from tests.evaluate.conftest import cut

VOCAB, STEPS, SEED = 24, 3, 4
LOSSES = (TopKLoadBalance(weight=0.1), RouterZLoss(weight=0.1))


@dataclasses.dataclass(frozen=True)
class Descent:
    """Plain gradient descent with momentum, so that there is a state to shard."""

    def learning_rate(self, step, steps):
        return jnp.float32(0.5)

    def transformation(self, steps):
        return optax.sgd(0.5, momentum=0.9)


def spec() -> ModelSpec:
    router = RouterSpec(selector=BiasedTopK(k=2, rate=0.01), gates=SigmoidGates())
    mixer = AttentionSpec(heads=2, kv_heads=1, head_width=8)
    layer = LayerSpec(mixer=mixer, ffn=MoESpec(experts=8, width=8, router=router))
    return ModelSpec(vocab=VOCAB, width=16, layers=(layer,) * 2, init_scale=0.2)


def batches():
    generator = np.random.default_rng(1)
    return [generator.integers(0, VOCAB, (8, 9)).astype(np.int32) for _ in range(STEPS)]


def parallel(strategy, rules=Rules(), **axes) -> Parallel:
    size = int(np.prod(list(axes.values())))
    return Parallel(MeshSpec(**axes).build(jax.devices()[:size]), strategy, rules)


def on_one_device(**how) -> tuple[TrainState, list[float]]:
    structure, state = start(DecoderLM(spec(), rngs=nnx.Rngs(SEED)), Descent(), STEPS)
    step = train_step(structure, Descent(), STEPS, losses=LOSSES, **how)
    return run(step, state)


def run(step, state) -> tuple[TrainState, list[float]]:
    said = []
    for tokens_BxS1 in batches():
        state, metrics = step(state, tokens_BxS1)
        said.append(float(metrics.objective))
    return state, said


def difference(state: TrainState, other: TrainState) -> float:
    """The largest difference of any leaf, relative to the largest value of that leaf."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3))

    return max(jax.tree.leaves(jax.tree.map(one, state, other)))


def training() -> dict:
    whole, said = on_one_device()
    halves, said_halves = on_one_device(accumulate=2)
    everything = Rules(embed=("fsdp", "node", "expert"))
    cases = {
        "padded": (parallel(PaddedAllToAll(), data=2, expert=4), {}, whole, said),
        "ring, fsdp": (parallel(Ring(), everything, fsdp=2, expert=4), {}, whole, said),
        "accumulated": (
            parallel(PaddedAllToAll(), data=2, expert=2, model=2),
            {"accumulate": 2, "remat": KeepDispatch()},
            halves,
            said_halves,
        ),
        "TED": (parallel(TED(), data=2, expert=2, model=2), {}, whole, said),
        "one device": (parallel(Local(), data=1), {"remat": KeepNothing()}, whole, said),
    }
    found = {}
    for name, (on, how, expected, expected_said) in cases.items():
        structure, state, placement = start_on_mesh(spec(), SEED, Descent(), STEPS, on)
        step = train_step(structure, Descent(), STEPS, losses=LOSSES, placement=placement, **how)
        before = state
        state, objective = run(step, state)
        moments = jax.tree.leaves(state.optimizer)
        found[name] = {
            "difference": difference(state, expected),
            "objective": np.abs(np.subtract(objective, expected_said)).max(),
            "donated": all(leaf.is_deleted() for leaf in jax.tree.leaves(before)),
            "kept": jax.tree.all(
                jax.tree.map(lambda leaf, s: leaf.sharding == s, state, placement.state)
            ),
            "largest_share": max(
                leaf.addressable_data(0).size / leaf.size for leaf in moments if leaf.ndim > 2
            ),
        }
    return found


def exchanges(remat) -> int:
    """All-to-alls in a training step, both passes."""
    on = parallel(PaddedAllToAll(), expert=8)
    structure, state, placement = start_on_mesh(spec(), SEED, Descent(), STEPS, on)
    step = train_step(structure, Descent(), STEPS, placement=placement, remat=remat)
    text = step.lower(state, batches()[0]).as_text("hlo")
    return len(re.findall(r" all-to-all\(", text))


def checkpoints(folder: str) -> dict:
    """Largest difference of logits, and of the optimizer, after a restore on another mesh."""
    meshes = {
        "2,4": parallel(PaddedAllToAll(), data=2, expert=4),
        "1,1": parallel(Local(), data=1),
        "4,2": parallel(Ring(), data=4, expert=2),
        "1,8": parallel(PaddedAllToAll(), expert=8),
    }
    rule, tokens = AdamW(warmup=1), batches()[0][:, :-1]

    def logits(structure, state, on):
        def apply(trainable, frozen):
            return forward(combine(structure, trainable, frozen), tokens, parallel=on).logits_BxSxV

        return np.asarray(jax.jit(apply)(state.trainable, state.frozen))

    structure, state, placement = start_on_mesh(spec(), SEED, rule, STEPS, meshes["2,4"])
    state, _ = run(train_step(structure, rule, STEPS, placement=placement), state)
    with TrainCheckpoints(folder) as saved:
        saved.save(STEPS, state, {})
        saved.wait()
        expected, found = logits(structure, state, meshes["2,4"]), {}
        for name, on in meshes.items():
            structure, like, where = start_on_mesh(spec(), SEED + 1, rule, STEPS, on)
            step, other, _ = saved.restore_latest(like)
            equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), other, state)
            placed = jax.tree.map(lambda leaf, s: leaf.sharding == s, other, where.state)
            found[name] = {
                "logits": float(np.abs(logits(structure, other, on) - expected).max()),
                "equal": jax.tree.all(equal),
                "placed": jax.tree.all(placed),
            }
        structure, like = start(DecoderLM(spec(), rngs=nnx.Rngs(0)), rule, STEPS)
        _, other, _ = saved.restore_latest(like)
        gap = np.abs(logits(structure, other, None) - expected).max()
        found["no mesh"] = {"logits": float(gap), "equal": True, "placed": True}
    return found


def evaluation() -> dict:
    on = parallel(PaddedAllToAll(), data=2, expert=4)
    structure, state, _ = start_on_mesh(spec(), SEED, Descent(), STEPS, on)
    model = combine(structure, state.trainable, state.frozen)
    other = DecoderLM(spec(), rngs=nnx.Rngs(SEED))
    text = cut({"docs": np.random.default_rng(0).integers(0, VOCAB, 190)}, 4)
    how = {"base": {"b": "a"}, "group_bytes": {"docs": 500}}
    one = evaluate({"a": other, "b": other}, text, **how)["b"]
    many = evaluate({"a": model, "b": model}, text, **how, parallel=on)["b"]
    return {
        "bits": abs(one.average.bits_per_byte - many.average.bits_per_byte),
        "counts": [
            bool((a == b).all())
            for a, b in zip(one.assignments["docs"], many.assignments["docs"], strict=True)
        ],
    }


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    report = {
        "training": training(),
        "exchanges": {
            "kept whole": exchanges(None),
            "dispatch": exchanges(KeepDispatch()),
            "nothing": exchanges(KeepNothing()),
        },
        "checkpoints": checkpoints(sys.argv[1]),
        "evaluation": evaluation(),
    }
    print(json.dumps(report))
