"""A model on eight devices beside the same on one; prints JSON: `-m tests.models.sharded_model`."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.core import SpecError, taps
from moejax.mesh import MeshSpec, Rules, batch_sharding
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    LayerSpec,
    ModelSpec,
    abstract_model,
    combine,
    forward,
    leaf_shardings,
    partition,
    place,
)
from moejax.moe import (
    BiasedTopK,
    MoESpec,
    PaddedAllToAll,
    Parallel,
    Protection,
    RandomImportance,
    RouterSpec,
    SigmoidGates,
    SkipSmallGates,
    SlotSpec,
    TopKLoadBalance,
)

MESH = MeshSpec(data=2, node=2, expert=2)
ALL_OVER = Rules(embed=("fsdp", "node", "expert"))


def make_spec() -> ModelSpec:
    """A dense layer, then routed ones with a stateful router, slots, a rule and a shared expert."""
    router = RouterSpec(selector=BiasedTopK(k=2, rate=0.01), gates=SigmoidGates())
    rule = SkipSmallGates(protect=Protection(share=0.3, importance=RandomImportance(seed=2)))
    routed = MoESpec(
        experts=6,
        width=12,
        router=router,
        shared_width=8,
        slots=SlotSpec(stored=12, copies=2),
        rules=(rule,),
    )
    mixer = AttentionSpec(heads=2, kv_heads=1, head_width=8)
    layers = (
        LayerSpec(mixer=mixer, ffn=DenseSpec(width=8)),
        *(LayerSpec(mixer=mixer, ffn=routed),) * 2,
    )
    return ModelSpec(vocab=24, width=16, layers=layers, init_scale=0.2)


def make_model() -> DecoderLM:
    model = DecoderLM(make_spec(), rngs=nnx.Rngs(0))
    moe = model.runs[1].moe
    moe.slots["copies"].set_value(jnp.full((2, 6), 2, jnp.int32))
    slot = (jnp.arange(6)[:, None] + jnp.asarray([0, 6])) % 12
    moe.slots["slot"].set_value(jnp.tile(slot.astype(jnp.int32), (2, 1, 1)))
    moe.rules[0]["beta"].set_value(jnp.full(2, 0.9, jnp.float32))
    return model


def run(model: DecoderLM, tokens_BxS, mask_BxS, parallel: Parallel | None):
    structure, trainable, frozen = partition(model)
    losses = (TopKLoadBalance(weight=1.0),)

    @jax.jit
    def step(trainable, frozen, tokens_BxS, mask_BxS):
        def loss(trainable):
            out = forward(
                combine(structure, trainable, frozen),
                tokens_BxS,
                mask_BxS=mask_BxS,
                train=True,
                request=frozenset({taps.DROPPED}),
                parallel=parallel,
            )
            routings = [r for r in out.routings if r is not None]
            balance = sum(term(routings, mask_BxS.reshape(-1)) for term in losses)
            logits = jnp.where(mask_BxS[..., None], out.logits_BxSxV, 0)
            seen = {
                "balance": balance,
                "counts": [r.counts_E() for r in routings],
                "state": [r.state for r in routings],
                "dropped": [tap["dropped"] for tap in out.taps if "dropped" in tap],
                "skipped": [jnp.sum(~r.valid_A) for r in routings],
            }
            return jnp.mean(jnp.sin(logits)) + balance, (logits, seen)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    return jax.device_get(step(trainable, frozen, tokens_BxS, mask_BxS))


def distances(found, expected) -> dict[str, float]:
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree_util.tree_leaves_with_path(expected),
        strict=True,
    )
    return {
        jax.tree_util.keystr(path): float(np.abs(np.float64(f) - np.float64(e)).max())
        for (path, f), (_, e) in pairs
    }


def outlined(model: DecoderLM) -> bool:
    """Whether an outline gets the shardings that the arrays get."""
    mesh = MESH.build()
    outline = place(abstract_model(make_spec()), mesh, ALL_OVER)
    leaves = jax.tree.leaves(nnx.split(outline)[1])
    placed = jax.tree.leaves(nnx.split(place(model, mesh, ALL_OVER))[1])
    return all(
        isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding == array.sharding
        for leaf, array in zip(leaves, placed, strict=True)
    )


def _names(part) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def refusal(mesh: MeshSpec) -> str | None:
    try:
        place(abstract_model(make_spec()), mesh.build())
    except SpecError as error:
        return error.field
    return None


if __name__ == "__main__":
    model, mesh = make_model(), MESH.build()
    rows = 6  # eight devices do not divide them
    tokens = np.random.default_rng(1).integers(0, 24, (rows, 5)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[1, 3:] = False
    one = run(model, tokens, mask, None)
    parallel = Parallel(mesh, PaddedAllToAll(), ALL_OVER)
    put = batch_sharding(mesh, rows)
    batch = [jax.device_put(array, put) for array in (tokens, mask)]
    many = run(place(model, mesh, ALL_OVER), *batch, parallel)
    cut = {
        name: [list(part) for part in map(_names, sharding.spec)]
        for name, sharding in leaf_shardings(model, mesh).items()
    }
    report = {
        "distances": distances(many, one),
        "skipped": [int(n) for n in one[0][1][1]["skipped"]],
        "outlined": outlined(model),
        "cut": cut,
        "refused": {
            "expert": refusal(MeshSpec(expert=8)),
            "model": refusal(MeshSpec(model=8)),
        },
    }
    json.dump(report, sys.stdout)
