"""Merged experts: which, with what weights, where tokens go, and what the ledger says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.hierarchy import cut_tree, linkage

from moejax.calibrate import ExpertCounts, LogitGram, MeanOutputs, Statistics, collect
from moejax.compress import (
    AlignedByWeights,
    AsStored,
    DominantExperts,
    EqualWeights,
    ExpertDrop,
    Frequency,
    GivenGroups,
    HierarchicalClusters,
    LogitFeatures,
    MergeExperts,
    OutputFeatures,
    Quantize,
    RandomGroups,
    RouterRowFeatures,
    WeightFeatures,
    account,
    check_recipe,
)
from moejax.core import SpecError, spec
from moejax.models import (
    abstract_model,
    generate,
    layers,
    merge_experts,
    parameters,
    permute_hidden,
    with_layers,
)
from moejax.moe import NestedSwiGLU, RouterContext
from moejax.weights import SymmetricGrid
from tests.compress.conftest import EXPERTS, FOUR_BITS, LAYERS, Source, apply, logits
from tests.compress.planted import PAIRS, duplicated
from tests.evaluate.conftest import dense, make_model, make_spec, routed, run

BY_HAND = GivenGroups(members=PAIRS)
THREE = HierarchicalClusters(groups=3)


@pytest.fixture(scope="module")
def stats(model, text):
    return collect(model, text, (ExpertCounts(), LogitGram(), MeanOutputs()))


@pytest.fixture(scope="module")
def merge(text):
    """(model, *passes) -> (after, ledger), each run once."""
    return functools.cache(lambda model, *recipe: apply(model, recipe, Source(text)))


def test_shuffled_duplicates_merge_without_loss_once_they_are_aligned(text, merge):
    """Catches merging without alignment, a wrong permutation of one of three matrices, slots that
    lead to the wrong expert, and gates of two merged choices that are not added."""
    model = duplicated()
    exact = logits(model, text)
    aligned, _ = merge(model, MergeExperts(grouping=BY_HAND, alignment=AlignedByWeights()))
    np.testing.assert_allclose(logits(aligned, text), exact, atol=2e-5)
    plain, _ = merge(model, MergeExperts(grouping=BY_HAND))
    assert np.abs(logits(plain, text) - exact).max() > 0.01
    assert aligned.spec.layers[0].ffn.stored == 3


def test_hidden_units_in_another_order_change_nothing(text, model):
    """Catches a permutation that moves gate and up but not down, or down by its inverse."""
    order = np.stack([np.random.default_rng(e).permutation(32) for e in range(EXPERTS)])
    shuffled = with_layers(model, [permute_hidden(block, order) for block in layers(model)])
    np.testing.assert_allclose(logits(shuffled, text), logits(model, text), atol=1e-5)
    name = "layers.0.moe.experts.up"
    assert not np.array_equal(parameters(shuffled)[name], parameters(model)[name])


def test_nested_gates_are_reordered_block_by_block():
    """Catches a gate of two blocks that is taken for 2 F units of one."""

    layer = routed(experts=3)
    ffn = layer.ffn.__class__(
        experts=3, width=8, router=layer.ffn.router, activation=NestedSwiGLU()
    )
    model = make_model(0, make_spec(layer.__class__(mixer=layer.mixer, ffn=ffn)))
    order = np.stack([np.random.default_rng(e).permutation(8) for e in range(3)])
    shuffled = with_layers(model, [permute_hidden(layers(model)[0], order)])
    x_TxD = jnp.asarray(np.random.default_rng(0).normal(size=(5, 32)), jnp.float32)
    both = [layers(m)[0].moe(x_TxD, RouterContext(), frozenset())[0] for m in (model, shuffled)]
    np.testing.assert_allclose(*both, atol=1e-5)


@pytest.mark.parametrize("method", ["average", "complete", "single", "ward"])
def test_clusters_are_scipys_on_mean_outputs(model, stats, method):
    """Catches the largest distance for complete linkage, unsquared Ward, k-means in disguise (all
    three in the released code), and clusters of weights or of router logits."""
    found = HierarchicalClusters(groups=3, linkage=method)(dict(enumerate(layers(model))), stats)
    for layer in range(LAYERS):
        wanted = cut_tree(linkage(stats.of(layer, MeanOutputs()), method), 3)[:, 0]
        same = found[layer][:, None] == found[layer]
        np.testing.assert_array_equal(same, wanted[:, None] == wanted)


def test_clusters_do_not_see_the_order_of_hidden_units(text):
    """Catches features of weights in the place of outputs: duplicates are found though shuffled."""
    model = duplicated()
    stats = collect(model, text, (MeanOutputs(),))
    found = THREE(dict(enumerate(layers(model))), stats)
    for layer in range(LAYERS):
        np.testing.assert_array_equal(found[layer], [0, 1, 2, 0, 1, 2])


def test_ties_give_as_many_groups_as_asked():
    """Catches a cut of the tree by height, which joins all pairs at distance zero at once."""
    rows = np.repeat(np.eye(3), 2, axis=0)
    assert len(set(HierarchicalClusters(groups=4)._clusters(rows))) == 4


def test_dominant_experts_are_the_most_used_of_all_layers(model, stats):
    """Catches a number of groups per layer where the threshold is over all layers, scores that are
    not shares of their layer, and joining by distance in the place of the cosine."""
    blocks = dict(enumerate(layers(model)))
    found = DominantExperts(groups=3)(blocks, stats)
    share, heads = {}, set()
    for layer in range(LAYERS):
        counts = stats.of(layer, ExpertCounts())
        best = sorted(range(EXPERTS), key=lambda e: (-counts[e], e))
        heads |= {(layer, e) for e in best[:2]}  # the router chooses two
        share |= {(layer, e): counts[e] / counts.sum() for e in best[2:]}
    heads |= set(sorted(share, key=lambda place: -share[place])[: 3 * LAYERS - len(heads)])
    assert {(i, int(e)) for i in range(LAYERS) for e in set(found[i])} == heads
    for layer in range(LAYERS):
        gram = stats.of(layer, LogitGram())
        cosine = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
        dominant = sorted(e for i, e in heads if i == layer)
        for e in set(range(EXPERTS)) - set(dominant):
            assert found[layer][e] == dominant[int(np.argmax(cosine[e, dominant]))]
        assert all(found[layer][e] == e for e in dominant)


def test_per_layer_every_layer_keeps_as_many(model, stats):
    """Catches the global threshold where a number per layer is asked for."""
    grouping = DominantExperts(groups=2, per_layer=True, features=RouterRowFeatures())
    found = grouping(dict(enumerate(layers(model))), stats)
    assert [len(set(found[i])) for i in range(LAYERS)] == [2, 2]


def test_the_gram_is_of_all_tokens_logits(model, text, stats):
    """Catches logits of chosen experts only, and padding that counts."""
    from tests.evaluate.conftest import run

    total = 0
    for batch in text:
        logits_TxE = np.asarray(run(model, batch).routings[0].logits_TxE, np.float64)
        logits_TxE = logits_TxE[np.asarray(batch.mask_BxS).reshape(-1)]
        total = total + logits_TxE.T @ logits_TxE
    np.testing.assert_allclose(stats.of(0, LogitGram()), total, rtol=1e-4, atol=1e-4)
    rows = LogitFeatures()(0, layers(model)[0], stats.layers[0])
    np.testing.assert_allclose(rows @ rows.T, total, rtol=1e-3, atol=1e-3)


def test_members_are_weighed_by_their_tokens(model, text, stats, merge):
    """Catches a plain mean, gates in the place of counts, and shares that do not sum to one."""
    after, _ = merge(model, MergeExperts(grouping=BY_HAND))
    counts = stats.of(0, ExpertCounts()).astype(np.float64)
    for name in ("gate", "up", "down"):
        before = np.asarray(parameters(model)[f"layers.0.moe.experts.{name}"], np.float64)
        new = np.asarray(parameters(after)[f"layers.0.moe.experts.{name}"])
        for g, (a, b) in enumerate(PAIRS):
            wanted = (counts[a] * before[a] + counts[b] * before[b]) / (counts[a] + counts[b])
            np.testing.assert_allclose(new[g], wanted, atol=1e-6)
    equal, _ = merge(model, MergeExperts(grouping=BY_HAND, weighting=EqualWeights()))
    up = np.asarray(parameters(model)["layers.1.moe.experts.up"])
    np.testing.assert_allclose(
        parameters(equal)["layers.1.moe.experts.up"], (up[:3] + up[3:]) / 2, atol=1e-6
    )


def test_a_token_of_two_merged_experts_gets_the_sum_of_their_gates(model):
    """Catches the second choice dropped, or gates that are renormalised over stored experts."""
    from moejax.moe import RouterContext

    block = layers(model)[0]
    merged = merge_experts(block, np.zeros(EXPERTS, int), np.full((1, EXPERTS), 1 / EXPERTS))
    x = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    y, routing, _ = merged.moe(jnp.asarray(x), RouterContext(), frozenset())
    gate, up, down = (
        np.asarray(getattr(block.moe.experts, n).get_value(), np.float64).mean(0)
        for n in ("gate", "up", "down")
    )
    silu = (x @ gate) / (1 + np.exp(-(x @ gate)))
    sums = np.asarray(routing.gate_A, np.float64).reshape(7, 2).sum(1)
    np.testing.assert_allclose(y, sums[:, None] * ((silu * (x @ up)) @ down), atol=1e-4)


def test_the_ledger_tells_what_merged_with_what(model, merge):
    """Catches rows that are numbered after a drop, merged experts that vanish or keep bytes, and
    tokens of one member for all."""
    drop = ExpertDrop(fraction=1 / 6, score=Frequency())
    two = GivenGroups(members=((0, 4), (1, 2), (3,)))
    after, ledger = merge(model, drop, MergeExperts(grouping=two), FOUR_BITS)
    dropped = next(r.expert for r in ledger if r.layer == 0 and r.dropped)
    left = [e for e in range(EXPERTS) if e != dropped]
    history = ledger.history("arm")
    assert history[0, dropped] == ("ExpertDrop: dropped",)
    a, b = left[0], left[4]
    assert history[0, a] == ("ExpertDrop", f"MergeExperts: merged with {b}", "Quantize")
    assert history[0, b] == ("ExpertDrop", f"MergeExperts: merged into {a}")
    last = ledger.last("arm")
    assert last[0, a, "moe.experts.up"].lineage == (f"merged with {b}",)
    assert last[0, b, "moe.experts.up"].stored_bytes == 0 and last[0, b, "moe.experts.up"].gone
    kept = [r for r in last.values() if not r.gone]
    assert sum(r.stored_bytes for r in kept) == account(after).expert_bytes
    counts = {r.expert: r.tokens for r in ledger if r.layer == 0 and r.pass_name == "MergeExperts"}
    final = {r.expert: r.tokens for r in kept if r.layer == 0}
    assert final[left[3]] == counts[left[3]]  # merged with none: its tokens are its own
    assert sum(final.values()) == sum(counts.values())


def test_merged_models_generate_and_are_planned(model, text, merge):
    """Catches slots that decoding forgets, and an outline of other shapes than the pass gives."""
    recipe = (MergeExperts(grouping=THREE), MergeExperts(grouping=HierarchicalClusters(groups=2)))
    after, _ = merge(model, *recipe)
    outlined = abstract_model(model.spec)
    for step in recipe:
        outlined, _ = step.outline(outlined)
    assert outlined.spec == after.spec
    shapes = {n: w.shape for n, w in parameters(outlined).items() if hasattr(w, "shape")}
    assert shapes == {n: w.shape for n, w in parameters(after).items() if hasattr(w, "shape")}
    prompt = text[0].tokens_BxS[:1, :6]
    new = generate(after, jnp.asarray(prompt), 3)
    whole = np.array(text[0].tokens_BxS)
    whole[:1, 6:9] = new
    scored = run(after, text[0]._replace(tokens_BxS=whole)).logits_BxSxV
    np.testing.assert_array_equal(new[0], np.asarray(scored)[0, 5:8].argmax(-1))


def test_groups_of_merged_experts_are_of_the_merged(model, text, merge):
    """Catches router experts counted where stored experts are meant."""
    twice, ledger = merge(
        model, MergeExperts(grouping=THREE), MergeExperts(grouping=RandomGroups(groups=2))
    )
    assert twice.spec.layers[0].ffn.stored == 2
    slot = np.asarray(layers(twice)[0].moe.slots["slot"].get_value())
    assert slot.shape == (EXPERTS, 1) and set(slot[:, 0]) == {0, 1}
    rows = [r for r in ledger if r.layer == 0 and r.matrix == "moe.experts.up"]
    first, second = rows[:EXPERTS], rows[EXPERTS:]
    assert sum(r.tokens for r in first) == sum(r.tokens for r in second)
    with pytest.raises(SpecError, match=r"LogitFeatures: layer 0 has 6 router experts on 3"):
        merge(model, MergeExperts(grouping=THREE), MergeExperts(grouping=DominantExperts(groups=2)))


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        ((MergeExperts(grouping=HierarchicalClusters(groups=1)),), r"groups = 1 in layer 0.*k = 2"),
        (
            (MergeExperts(grouping=HierarchicalClusters(groups=7)),),
            r"groups = 7 in layer 0.*stores 6",
        ),
        (
            (FOUR_BITS, MergeExperts(grouping=THREE)),
            r"step 2 of the recipe, MergeExperts: .*layers.0.moe.experts.down.*Packed",
        ),
        (
            (MergeExperts(grouping=THREE), ExpertDrop(fraction=0.5, score=Frequency())),
            r"step 2 of the recipe, ExpertDrop: .*slot map.*\n.*before merging",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_before_any_work(model, recipe, wrong):
    """Catches a recipe that fails after an hour of calibration, and errors that name no pass."""
    with pytest.raises(SpecError, match=r"(?s)" + wrong):
        check_recipe(recipe, model)


def test_models_without_experts_are_refused():
    """Catches a merge that does nothing in silence."""
    with pytest.raises(SpecError, match="no experts"):
        check_recipe((MergeExperts(grouping=THREE),), make_model(0, make_spec(dense())))


@pytest.mark.parametrize("grouping", [THREE, DominantExperts(groups=3)])
def test_a_similarity_that_is_not_a_number_names_layer_and_expert(model, stats, grouping):
    """Catches a NaN that makes every expert equally near."""
    spoiled = []
    for layer in stats.layers:
        changed = {n: np.array(a) for n, a in layer.items()}
        changed["mean_outputs"][4, 0] = np.nan
        changed["logit_gram"][4, 4] = np.nan
        spoiled.append(changed)
    bad = Statistics(tuple(spoiled), stats.tokens, "")
    with pytest.raises(SpecError, match=r"Features: expert 4 of layer 0.*\n.*calibrate"):
        MergeExperts(grouping=grouping).decide(bad, model)


def test_groups_by_hand_must_fit():
    """Catches experts left out, named twice, or numbered as before a drop."""
    with pytest.raises(SpecError, match="one group"):
        GivenGroups(members=((0, 1), (1, 2)))
    with pytest.raises(SpecError, match=r"has 4 experts, layer 0 stores 6"):
        GivenGroups(members=((0, 1), (2, 3)))(dict(enumerate(layers(make_model()))), None)


@spec
class Negative:
    """Weights below zero."""

    def needs(self):
        return ()

    def __call__(self, layer, block, stats):
        return -np.ones(EXPERTS)


def test_weights_below_zero_are_refused_and_unused_groups_take_the_mean(model, stats):
    """Catches a division by zero, and weights that cancel."""
    with pytest.raises(SpecError, match=r"expert 0 of layer 0 the weight -1"):
        MergeExperts(grouping=BY_HAND, weighting=Negative()).decide(stats, model)
    counts = {"expert_counts": np.array([0, 5, 0, 0, 15, 1])}
    dead = Statistics(({**stats.layers[0], **counts}, stats.layers[1]), stats.tokens, "")
    step = MergeExperts(grouping=BY_HAND)
    plan = step.decide(dead, model)
    np.testing.assert_allclose(plan[0].weight_E, [0.5, 0.25, 0, 0.5, 0.75, 1])
    edit = step.apply_layer(0, layers(model)[0], plan, {}, jax.random.key(0))
    assert [m.fallback is not None for m in edit.matrices[:EXPERTS]] == [True, False, False] * 2


def test_experts_whose_weights_are_alike_are_found_by_weights():
    """Catches features of one matrix only."""
    model = duplicated(shuffled=False)
    rows = WeightFeatures()(0, layers(model)[0], {})
    np.testing.assert_array_equal(rows[:3], rows[3:])
    assert np.linalg.norm(rows[0] - rows[1]) > 0.1
    assert isinstance(AsStored()(layers(model)[0], ()), np.ndarray)
    assert OutputFeatures().needs() == (MeanOutputs(),)
    assert Quantize(grid=SymmetricGrid(bits=4, group=None)) == FOUR_BITS
