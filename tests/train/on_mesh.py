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
    Structure,
    combine,
    forward,
)
from moejax.moe import (
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
from moejax.train import TrainState, outline_on_mesh, start, start_on_mesh, train_step
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


def trained(on: Parallel, **how) -> tuple[Structure, TrainState, dict]:
    """A run on a mesh, and what became of its arrays."""
    structure, state, placement = start_on_mesh(spec(), SEED, Descent(), STEPS, on)
    step = train_step(structure, Descent(), STEPS, losses=LOSSES, placement=placement, **how)
    before = state
    state, objective = run(step, state)
    banks = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 4]  # [L, E, K, N]
    return (
        structure,
        state,
        {
            "objective": objective,
            "donated": all(leaf.is_deleted() for leaf in jax.tree.leaves(before)),
            "kept": jax.tree.all(jax.tree.map(_lies, state, placement.state)),
            "largest_share": max(leaf.addressable_data(0).size / leaf.size for leaf in banks),
        },
    )


def _lies(leaf, sharding) -> bool:
    return leaf.sharding == sharding


def training(padded: tuple[Structure, TrainState, dict]) -> dict:
    everything = Rules(embed=("fsdp", "node", "expert"))
    whole, halves = on_one_device(), on_one_device(accumulate=2)
    kept = {"accumulate": 2, "remat": KeepDispatch()}
    cases = {
        "padded": (padded, whole),
        "ring, fsdp": (trained(parallel(Ring(), everything, fsdp=2, expert=4)), whole),
        "accumulated": (
            trained(parallel(PaddedAllToAll(), data=2, expert=2, model=2), **kept),
            halves,
        ),
    }
    found = {}
    for name, ((_, state, said), (expected, objective)) in cases.items():
        apart = float(np.abs(np.subtract(said["objective"], objective)).max())
        found[name] = {**said, "difference": difference(state, expected), "objective": apart}
    return found


def exchanges(remat) -> int:
    """All-to-alls in a training step, both passes."""
    on = parallel(PaddedAllToAll(), expert=8)
    structure, state, placement = outline_on_mesh(spec(), Descent(), STEPS, on)
    step = train_step(structure, Descent(), STEPS, placement=placement, remat=remat)
    text = step.lower(state, batches()[0]).as_text("hlo")
    return len(re.findall(r" all-to-all\(", text))


def checkpoints(folder: str, structure: Structure, state: TrainState) -> dict:
    """Largest difference of logits, and of the optimizer, after a restore on another mesh."""
    meshes = {
        "1,1": parallel(Local(), data=1),
        "4,2": parallel(Ring(), data=4, expert=2),
        "1,8": parallel(PaddedAllToAll(), expert=8),
    }
    tokens = batches()[0][:, :-1]

    def logits(structure, state, on):
        def apply(trainable, frozen):
            return forward(combine(structure, trainable, frozen), tokens, parallel=on).logits_BxSxV

        return np.asarray(jax.jit(apply)(state.trainable, state.frozen))

    found = {}
    with TrainCheckpoints(folder) as saved:
        saved.save(STEPS, state, {})
        saved.wait()
        expected = logits(structure, state, WRITTEN_ON)
        for name, on in meshes.items():
            structure, like, where = outline_on_mesh(spec(), Descent(), STEPS, on)
            other = saved.restore(STEPS, like)[0]
            equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), other, state)
            found[name] = {
                "logits": float(np.abs(logits(structure, other, on) - expected).max()),
                "equal": jax.tree.all(equal),
                "placed": jax.tree.all(jax.tree.map(_lies, other, where.state)),
            }
    return found


def evaluation(structure: Structure, state: TrainState) -> dict:
    model = combine(structure, state.trainable, state.frozen)
    other = combine(structure, *jax.device_get((state.trainable, state.frozen)))
    text = cut({"docs": np.random.default_rng(0).integers(0, VOCAB, 190)}, 4)
    how = {"base": {"b": "a"}, "group_bytes": {"docs": 500}}
    one = evaluate({"a": other, "b": other}, text, **how)["b"]
    many = evaluate({"a": model, "b": model}, text, **how, parallel=WRITTEN_ON)["b"]
    return {
        "bits": abs(one.average.bits_per_byte - many.average.bits_per_byte),
        "counts": [
            bool((a == b).all())
            for a, b in zip(one.assignments["docs"], many.assignments["docs"], strict=True)
        ],
    }


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    WRITTEN_ON = parallel(PaddedAllToAll(), data=2, expert=4)
    padded = trained(WRITTEN_ON)
    report = {
        "training": training(padded),
        "exchanges": {
            "kept whole": exchanges(None),
            "dispatch": exchanges(KeepDispatch()),
            "nothing": exchanges(KeepNothing()),
        },
        "checkpoints": checkpoints(sys.argv[1], *padded[:2]),
        "evaluation": evaluation(*padded[:2]),
    }
    print(json.dumps(report))
