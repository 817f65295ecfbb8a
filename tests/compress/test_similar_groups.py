"""Groups by similarity of outputs (DEK): CKA, the best partition, merged router rows."""

import itertools

import numpy as np
import pytest

from moejax.calibrate import LayerInputs, collect
from moejax.compress import (
    AlignedByWeights,
    EqualWeights,
    ExpertDrop,
    Frequency,
    MergeExperts,
    MergeRouter,
    OutputGrams,
    SimilarGroups,
    WeightFeatures,
    check_recipe,
)
from moejax.compress.similar_groups import kept_inside
from moejax.core import SpecError
from moejax.models import layers, parameters
from tests.compress.conftest import EXPERTS, LAYERS, Source, apply, logits
from tests.compress.planted import duplicated
from tests.compress.tiny_moe import experts_of, make_block, make_inputs

TOKENS = 40
GRAMS = OutputGrams(tokens=TOKENS)
BY_OUTPUT = SimilarGroups(groups=3, features=GRAMS)
MERGE = MergeExperts(grouping=BY_OUTPUT, weighting=EqualWeights(), alignment=AlignedByWeights())


def test_cosines_are_the_linear_cka():
    """Catches outputs that are not centred, and a kernel over channels instead of inputs."""
    block, x_TxD = make_block(), make_inputs(tokens=TOKENS)
    rows = GRAMS(0, block, {LayerInputs(tokens=TOKENS).name: x_TxD})
    found = rows @ rows.T / np.outer(*[np.linalg.norm(rows, axis=1)] * 2)
    outputs = []
    for gate, up, down in zip(*experts_of(block), strict=True):
        a = x_TxD @ gate
        y = (a / (1 + np.exp(-a)) * (x_TxD @ up)) @ down
        outputs.append(y - y.mean(0))
    for i, j in itertools.product(range(EXPERTS), repeat=2):
        y, z = outputs[i], outputs[j]
        own = np.linalg.norm(y.T @ y) * np.linalg.norm(z.T @ z)
        np.testing.assert_allclose(found[i, j], np.linalg.norm(y.T @ z) ** 2 / own, rtol=1e-4)


def test_the_partition_is_the_best_of_all():
    """Catches one large group that holds most similarity, and a search that stops at once."""
    hits = 0
    for seed in range(12):
        s = np.random.default_rng(seed).random((6, 6))
        s = (s + s.T) / 2
        np.fill_diagonal(s, 1)
        found = BY_OUTPUT._partition(s)
        assert len(np.unique(found)) == 3
        every = [np.array(p) for p in itertools.product(range(3), repeat=6) if len(set(p)) == 3]
        best = max(kept_inside(s, label) for label in every)
        hits += kept_inside(s, found) > best - 1e-9
    assert hits >= 9  # a local search: measured 11


def test_duplicates_are_found_by_outputs_alone(text):
    """Catches groups by weights as they are stored, which shuffled hidden units hide."""
    planted = duplicated()
    blocks = dict(enumerate(layers(planted)))
    stats = collect(planted, text, (LayerInputs(tokens=TOKENS),))
    pairs = np.array([0, 1, 2, 0, 1, 2])
    assert all((label == pairs).all() for label in BY_OUTPUT(blocks, stats).values())
    blind = SimilarGroups(groups=3, features=WeightFeatures())(blocks, stats)
    assert any((label != pairs).any() for label in blind.values())


def test_merged_rows_are_means_and_the_map_goes(text):
    """Catches rows of the first member, sums, and a slot map that stays beside fewer rows."""
    planted = duplicated()
    merged, _ = apply(planted, [MERGE], Source(text))
    after, _ = apply(planted, [MERGE, MergeRouter()], Source(text))
    name = "layers.1.moe.router.scores.kernel"
    old, new = (np.asarray(parameters(m)[name]) for m in (planted, after))
    np.testing.assert_allclose(new, (old[:, :3] + old[:, 3:]) / 2, atol=1e-6)
    assert [m.ffn.experts for m in after.spec.layers] == [3] * LAYERS
    assert all(m.ffn.slots is None for m in after.spec.layers)
    assert logits(after, text).shape == logits(merged, text).shape
    weighted, _ = apply(planted, [MERGE, MergeRouter(weighting=Frequency())], Source(text))
    assert np.abs(np.asarray(parameters(weighted)[name]) - new).max() > 1e-3


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        ([MergeRouter()], r"MergeRouter: layer 0 has no slot map.*\n.*MergeExperts before"),
        ([MERGE, MergeRouter(), MergeRouter()], r"step 3 .*no slot map"),
        (
            [MERGE, MergeRouter(), ExpertDrop(fraction=0.5, score=Frequency())],
            r"step 3 .*leaves 1 of 3",
        ),
        ([MergeExperts(grouping=SimilarGroups(groups=1))], r"groups = 1 in layer 0.*k = 2"),
    ],
)
def test_what_cannot_be_merged_is_refused(model, recipe, wrong):
    """Catches rows averaged over experts that are still their own, after hours."""
    with pytest.raises(SpecError, match=r"(?s)" + wrong):
        check_recipe(recipe, model)
