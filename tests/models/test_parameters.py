"""Names, partition, abstract models, counts and edits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import weights
from moejax.core import CheckpointError, SpecError, from_json, to_json
from moejax.models import (
    AttentionSpec,
    DecoderLM,
    DenseSpec,
    LayerSpec,
    ModelSpec,
    abstract_model,
    combine,
    count_parameters,
    even_attention,
    layers,
    parameters,
    partition,
    permute_experts,
    select_experts,
    with_layers,
    with_parameters,
)
from moejax.moe import (
    BiasedTopK,
    MoESpec,
    RouterContext,
    RouterSpec,
    SigmoidGates,
    SoftmaxGates,
    TopK,
)


def test_spec_travels_as_json(spec):
    """Catches fields that are lost on the way to model.json."""
    assert from_json(to_json(spec)) == spec and hash(from_json(to_json(spec))) == hash(spec)


def test_parameters_round_trip(run, spec, model, tokens_BxS):
    """Catches parameters that are renamed, lost or moved to another layer."""
    again = with_parameters(spec, parameters(model))
    same = run(again, tokens_BxS).logits_BxSxV == run(model, tokens_BxS).logits_BxSxV
    assert bool(same.all())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_spec_are_refused(spec, model, change):
    """Catches a load that fills gaps with random weights."""
    named = parameters(model)
    name = "layers.1.moe.experts.up"
    if change == "missing":
        del named[name]
    elif change == "extra":
        named["layers.7.moe.experts.up"] = named[name]
    else:
        named[name] = named[name][:, :, :-1]
    with pytest.raises(CheckpointError, match="layers.[17].moe.experts.up"):
        with_parameters(spec, named)


def test_abstract_model_has_every_shape_and_no_memory(spec, model):
    """Catches an abstract model that differs from the real one, formats included."""
    named = parameters(model)
    name = "layers.2.moe.experts.down"
    named[name] = weights.SymmetricGrid(bits=3, group=32)(named[name])
    real = with_parameters(spec, named)
    hollow = abstract_model(spec, {name: weights.format_meta(named[name])})
    shapes = lambda m: jax.tree.map(lambda a: (a.shape, a.dtype), nnx.split(m)[1])
    assert shapes(hollow) == shapes(real)
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.split(hollow)[1])
    )


def test_partition_gives_the_optimizer_floats_that_train():
    """Catches codes, router state or frozen names among what the optimizer sees."""
    router = RouterSpec(selector=BiasedTopK(k=1), gates=SigmoidGates())
    layer = LayerSpec(mixer=None, ffn=MoESpec(experts=2, width=32, router=router))
    model = DecoderLM(ModelSpec(vocab=8, width=32, layers=(layer,)), rngs=nnx.Rngs(0))
    named = parameters(model)
    bank = named["layers.0.moe.experts.up"]
    named["layers.0.moe.experts.up"] = weights.Sum(
        (weights.SymmetricGrid(bits=4, group=32)(bank), weights.truncated_svd(bank, 2))
    )
    model = with_parameters(model.spec, named)
    structure, trainable, frozen = partition(model, lambda name: name != "embed")
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in trainable.values())
    assert "embed" in frozen and "runs.0.moe.router.selector.bias" in frozen
    assert any(name.endswith(".words") for name in frozen)
    assert sum("experts.up" in name for name in trainable) == 3  # scale, u, v
    hash(structure)
    before = jax.tree.leaves(nnx.split(model)[1])
    after = jax.tree.leaves(nnx.split(combine(structure, trainable, frozen))[1])
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_counts_follow_the_dimensions():
    """Catches active counts that forget the router, the embedding rule or the chosen experts."""
    router = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates())
    layer = LayerSpec(
        mixer=AttentionSpec(heads=2, kv_heads=1, head_width=4),
        ffn=MoESpec(experts=5, width=6, router=router),
    )
    spec = ModelSpec(vocab=11, width=8, layers=(layer,) * 3, tie_embeddings=False)
    attention, expert, norms = 8 * 8 + 2 * 8 * 4 + 8 * 8, 3 * 8 * 6, 2 * 8
    per_layer = attention + 8 * 5 + norms
    counts = count_parameters(spec)
    assert counts.total == 2 * 11 * 8 + 8 + 3 * (per_layer + 5 * expert)
    assert counts.active == 2 * 11 * 8 + 8 + 3 * (per_layer + 2 * expert)
    assert counts.active_without_input_embedding == counts.active - 88
    assert counts.active_without_embeddings == counts.active - 176
    sizes = [math.prod(v.shape) for v in parameters(DecoderLM(spec, rngs=nnx.Rngs(0))).values()]
    assert counts.total == sum(sizes)


def test_selected_experts_keep_their_router_rows(model):
    """Catches router rows that do not follow their experts."""
    keep = [3, 1, 2]
    blocks = layers(model)
    pruned = with_layers(model, [blocks[0], *(select_experts(b, keep) for b in blocks[1:])])
    assert pruned.spec.layers[1].ffn.experts == 3
    x_TxD = jax.random.normal(jax.random.key(0), (12, 32))
    small, full = layers(pruned)[1].moe.router, blocks[1].moe.router
    logits = full(x_TxD, RouterContext()).logits_TxE[:, jnp.array(keep)]
    np.testing.assert_allclose(small(x_TxD, RouterContext()).logits_TxE, logits, atol=1e-6)
    np.testing.assert_array_equal(
        layers(pruned)[1].moe.experts.up[...], blocks[1].moe.experts.up[...][jnp.array(keep)]
    )


def test_permuted_experts_leave_the_function_alone(run, model, tokens_BxS):
    """Catches an order applied to the bank and not to the router, or the other way round."""
    moved = with_layers(
        model, [permute_experts(b, [2, 0, 3, 1]) if b.moe else b for b in layers(model)]
    )
    np.testing.assert_allclose(
        run(moved, tokens_BxS).logits_BxSxV, run(model, tokens_BxS).logits_BxSxV, atol=2e-5
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: AttentionSpec(heads=3, kv_heads=2, head_width=4),
        lambda: AttentionSpec(heads=2, kv_heads=1, head_width=5),
        lambda: even_attention(width=10, heads=4, kv_heads=2),
        lambda: DenseSpec(width=0),
        lambda: ModelSpec(vocab=1, width=4, layers=()),
    ],
)
def test_impossible_specs_are_refused(build):
    """Catches specs that fail only when the first batch arrives."""
    with pytest.raises(SpecError):
        build()


def test_select_refuses_what_cannot_be(model):
    """Catches a selection below the router's top-k, repeated or out of range."""
    block = layers(model)[1]
    for keep in ([0], [0, 0, 1], [0, 9]):
        with pytest.raises(SpecError):
            select_experts(block, keep)
    with pytest.raises(SpecError, match="no experts"):
        select_experts(layers(model)[0], [0])
