"""The one-shot driver: when it asks for statistics, and the rows it writes."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.calibrate import ExpertCounts, SoftCounts, collect
from moejax.compress import (
    ExpertDrop,
    LayerEdit,
    MeanProbability,
    OutsidePass,
    Pass,
    compress,
    payload,
    touched,
)
from moejax.core import spec
from moejax.models import abstract_model, parameters, permute_experts, with_parameters
from moejax.runs import Ledger
from tests.compress.conftest import (
    EXPERTS,
    FOUR_BITS,
    HALF,
    LAYERS,
    MATRICES,
    apply,
    assert_same_weights,
)
from tests.evaluate.conftest import dense, make_model, make_spec, routed

LEDGER = {"expert_counts", "gate_mass"}


@spec
class Look:
    """Reads a statistic and changes nothing."""

    def outline(self, model):
        return model, ()

    def needs(self, model):
        return (SoftCounts(),)

    def layer_needs(self, model):
        return ()

    def invalidates(self, accumulator):
        return False

    def decide(self, stats, model):
        return [stats.of(i, SoftCounts()) for i in model.spec.moe_layers]

    def apply_layer(self, index, block, plan, stats, key):
        return LayerEdit(block)


@spec
class Reverse:
    """Turns the order of experts round, which statistics by index do not survive."""

    def outline(self, model):
        return model, ()

    def needs(self, model):
        return ()

    def layer_needs(self, model):
        return ()

    def invalidates(self, accumulator):
        return True

    def decide(self, stats, model):
        return None

    def apply_layer(self, index, block, plan, stats, key):
        order = tuple(reversed(range(block.spec.ffn.experts)))
        return LayerEdit(permute_experts(block, order), experts=order)


def test_statistics_are_collected_once(model, source):
    """Catches a calibration per pass, and per statistic, where nothing was invalidated."""
    after, _ = apply(model, [Look(), Look(), FOUR_BITS], source)
    assert source.asked == [LEDGER | {"soft_counts"}]
    assert parameters(after)["layers.1.moe.experts.up"].bits == 4


def test_statistics_are_collected_anew_where_a_pass_invalidates_them(model, source):
    """Catches a second drop that reads the counts of experts which are gone."""
    again = ExpertDrop(fraction=1 / 3, score=MeanProbability())
    apply(model, [HALF, Look(), again], source)
    assert source.asked == [LEDGER, LEDGER | {"soft_counts"}]


def test_passes_are_what_the_protocol_says():
    """Catches a pass without one of the protocol's methods."""
    assert all(isinstance(step, Pass) for step in (FOUR_BITS, HALF, Look()))
    assert isinstance(FOUR_BITS, OutsidePass)
    assert not isinstance(HALF, OutsidePass)


def test_an_outline_is_what_comes_of_a_pass(model, applied):
    """Catches a plan that promises other formats, fewer experts or other names than it makes."""
    outlined, names = abstract_model(model.spec), []
    for step in (HALF, FOUR_BITS):
        outlined, touched_now = step.outline(outlined)
        names += touched_now
    after, ledger = applied(HALF, FOUR_BITS)
    assert outlined.spec == after.spec
    assert payload(outlined) == payload(after)
    assert set(names) == set(touched(ledger, "arm"))


def test_rows_add_up_to_what_the_model_lost(model, applied):
    """Catches a matrix without rows, and bytes without scales."""
    after, ledger = applied(FOUR_BITS)
    assert len(ledger) == LAYERS * EXPERTS * MATRICES
    assert len(ledger.last("arm")) == len(ledger)
    before, now = payload(model), payload(after)
    names = touched(ledger, "arm")
    assert sorted(names) == sorted(n for n in before if ".moe.experts." in n)
    stored = sum(row.stored_bytes for row in ledger)
    assert stored == LAYERS * EXPERTS * MATRICES * (32 * 32 // 2 + 32 * 2)
    lost = sum(before.values()) - sum(now.values())
    assert lost == sum(before[name] for name in names) - stored


def test_a_drop_and_a_rounding_add_up_too(model, applied, source):
    """Catches bytes of the dropped in the sum, and float32 bytes for bfloat16 files."""
    after, ledger = applied(HALF, FOUR_BITS)
    stored = sum(row.stored_bytes for row in ledger.last("arm").values())
    assert stored == sum(n for name, n in payload(after).items() if ".moe.experts." in name)
    _, dropped = applied(HALF)
    assert {row.stored_bytes for row in dropped} == {0, 32 * 32 * 2}
    _, wide = apply(model, [HALF], source, dtype=jnp.float32)
    assert {row.stored_bytes for row in wide} == {0, 32 * 32 * 4}


def test_rows_name_experts_of_the_first_model(applied):
    """Catches rows under the numbers of a permuted model."""
    (_, plain), (_, turned) = applied(FOUR_BITS), applied(Reverse(), FOUR_BITS)
    for field in ("relative_error", "tokens"):
        wanted = {(r.layer, r.expert, r.matrix): getattr(r, field) for r in plain}
        assert {(r.layer, r.expert, r.matrix): getattr(r, field) for r in turned} == wanted
        assert len(set(wanted.values())) > 2


def test_an_expert_without_tokens_is_dead(source, text):
    """Catches an expert that nothing was seen of, reported as calibrated."""
    model = make_model(0)
    named = dict(parameters(model))
    named["embed"] = named["embed"].at[:, 0].set(2.0)  # a direction that every token has
    kernel = "layers.0.moe.router.scores.kernel"
    named[kernel] = named[kernel].at[0, 3].set(-50.0)
    planted = with_parameters(model.spec, named)
    _, ledger = apply(planted, [FOUR_BITS], source)
    found = collect(planted, text, (ExpertCounts(),))
    unseen = {
        (i, int(e)) for i in range(LAYERS) for e in np.flatnonzero(found.of(i, ExpertCounts()) == 0)
    }
    assert (0, 3) in unseen
    assert len(unseen) < LAYERS * EXPERTS / 2
    assert {(row.layer, row.expert) for row in ledger if row.dead} == unseen
    assert {(row.layer, row.expert) for row in ledger if not row.calibrated} == unseen
    for row in ledger:
        assert row.relative_error > 0
        assert row.dead or 0 < row.gate_mass < row.tokens


def test_the_same_key_makes_the_same_model(model, source, applied):
    """Catches a decision that depends on anything but its inputs."""
    (first, rows), (second, same) = (
        applied(HALF, FOUR_BITS),
        apply(model, [HALF, FOUR_BITS], source),
    )
    assert_same_weights(first, second)
    assert rows.rows == same.rows


def test_layers_without_experts_pass_through(source):
    """Catches a driver that counts layers with experts where it means layers."""
    model = make_model(2, make_spec(dense(), routed()))
    after, ledger = apply(model, [HALF], source)
    assert {row.layer for row in ledger} == {1}
    assert after.spec.layers[0] == model.spec.layers[0]
    assert after.spec.layers[1].ffn.experts == 3


def test_an_empty_recipe_is_the_model(model, source):
    """Catches a driver that calibrates for nothing."""
    after, ledger = apply(model, [], source)
    assert_same_weights(after, model)
    assert not len(ledger)
    assert not source.asked


class _Bar:
    def __init__(self):
        self.steps = 0

    def advance(self, n=1, **facts):
        self.steps += n


def test_progress_counts_passes_and_layers(model, source):
    """Catches a bar that stops short of its total."""
    bar = _Bar()
    apply(model, [Look(), HALF], source, progress=bar)
    assert bar.steps == 2 * LAYERS


def test_keys_differ_by_pass_and_layer(model, source):
    """Catches one key for all layers, which rounds all of them with the same noise."""
    seen = []

    @spec
    class Draw(Look):
        def apply_layer(self, index, block, plan, stats, key):
            seen.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
            return LayerEdit(block)

    for seed in (0, 0, 1):
        key, recipe = jax.random.key(seed), [Draw(), Draw()]
        compress(model, recipe, source, key=key, arm="arm", ledger=Ledger())
    assert seen[:4] == seen[4:8]
    assert len(set(seen)) == 8
