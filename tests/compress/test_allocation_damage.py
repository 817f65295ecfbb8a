"""Plans led by the loss: the tolerance is kept, and bits go to experts that need them."""

from types import SimpleNamespace

import numpy as np
import pytest

from moejax.compress.allocation_damage import DamageBudget
from moejax.compress.block_weights import block_weights, expert_matrices, with_block_weights
from moejax.compress.methods import FullPrecision
from moejax.compress.text_windows import spread
from moejax.core import MoejaxError, SpecError
from moejax.models import layers, with_layers
from moejax.weights import AsymmetricGrid
from tests.compress.tiny_moe import mixed, scaled
from tests.evaluate.conftest import cut, make_model, make_tokens
from tests.evaluate.conftest import run as forward

GRIDS = (
    AsymmetricGrid(bits=1, group=None),
    AsymmetricGrid(bits=4, group=None),
    AsymmetricGrid(bits=2, group=None),
)
LOUD = ((0, 2), (1, 4))  # layer, expert


@pytest.fixture(scope="module")
def model():
    """Two layers in which one expert each says ten times more than the others."""
    tiny = make_model(0)
    blocks = [
        scaled(block, [10 if (layer, e) in LOUD else 1 for e in range(6)])
        for layer, block in enumerate(layers(tiny))
    ]
    return with_layers(tiny, blocks)


@pytest.fixture(scope="module")
def text(model):
    """Whose next tokens are what the model expects, so that any change is damage."""
    found = cut({"docs": make_tokens(75)}, 3)
    expected = (np.asarray(forward(model, batch).logits_BxSxV).argmax(-1) for batch in found)
    return tuple(b._replace(targets_BxS=t) for b, t in zip(found, expected, strict=True))


def nll(model, text):
    """Mean negative log-likelihood over 4 of the 5 windows, evenly spread, in NumPy."""
    rows = []
    for batch in text:
        logits = np.asarray(forward(model, batch).logits_BxSxV, np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = np.take_along_axis(logits, batch.targets_BxS[..., None], -1)[..., 0]
        rows += [-t[m] for t, m in zip(targets, batch.mask_BxS, strict=True)]
    return float(np.concatenate([rows[i] for i in (0, 1, 3, 4)]).mean())


def increase(model, text, plan):
    """Relative, when the experts are on the grids of a plan."""
    blocks = [mixed(block, GRIDS, plan[layer]) for layer, block in enumerate(layers(model))]
    return nll(with_layers(model, blocks), text) / nll(model, text) - 1


def bits(plan):
    return sum(GRIDS[i].bits for choice in plan.values() for i in choice)


@pytest.mark.parametrize("direction", ["lower", "raise"])
def test_the_tolerance_is_kept_with_fewer_bits_than_any_one_grid(model, text, direction):
    """Catches losses added up instead of measured together, and a plan one step too far."""
    uniform = {i: {0: (i,) * 6, 1: (i,) * 6} for i in range(3)}
    damage = {i: increase(model, text, plan) for i, plan in uniform.items()}
    assert 0 < damage[1] < damage[2] < damage[0]
    tolerance = 0.5 * (damage[1] + damage[2])
    budget = DamageBudget(tolerance=tolerance, direction=direction, windows=4)
    plan = budget.decide(SimpleNamespace(text=text), model, GRIDS)
    assert increase(model, text, plan) <= tolerance
    assert 2 * 12 < bits(plan) < 4 * 12
    if direction == "raise":
        exact = DamageBudget(tolerance=damage[2] * 1.001, direction=direction, windows=4)
        found = exact.decide(SimpleNamespace(text=text), model, GRIDS)
        assert bits(found) <= 24 and increase(model, text, found) <= exact.tolerance


def test_experts_go_down_in_the_order_of_their_importance(model, text):
    """Catches the most important lowered first, and importance measured on another grid."""
    alone = {}
    for layer, e in [(layer, e) for layer in range(2) for e in range(6)]:
        blocks = layers(model)
        near = block_weights(mixed(blocks[layer], GRIDS, [0] * 6))
        named = block_weights(blocks[layer])
        one = {m: named[m].at[e].set(near[m][e]) for m in expert_matrices(blocks[layer])}
        blocks[layer] = with_block_weights(blocks[layer], one)
        alone[layer, e] = nll(with_layers(model, blocks), text)
    grids = (GRIDS[0], FullPrecision())
    tolerance = 0.5 * increase(model, text, {0: (0,) * 6, 1: (0,) * 6})
    budget = DamageBudget(tolerance=tolerance, windows=4)
    plan = budget.decide(SimpleNamespace(text=text), model, grids)
    lowered = [alone[layer, e] for layer in plan for e in range(6) if plan[layer][e] == 0]
    kept = [alone[layer, e] for layer in plan for e in range(6) if plan[layer][e] == 1]
    assert lowered and kept and max(lowered) < min(kept)


def test_no_plan_is_no_plan(model, text):
    """Catches a tolerance that is broken in silence, and a budget without text."""
    with pytest.raises(MoejaxError, match=r"tolerance = 0 is broken with all experts at 4 bits"):
        DamageBudget(tolerance=0.0, windows=4).decide(SimpleNamespace(text=text), model, GRIDS)
    with pytest.raises(MoejaxError, match="no calibration text"):
        DamageBudget(tolerance=0.1).decide(SimpleNamespace(text=()), model, GRIDS)
    with pytest.raises(SpecError, match="direction"):
        DamageBudget(tolerance=0.1, direction="sideways")


def test_profiling_reads_all_groups():
    """Catches importance measured on the first group of a text alone, and windows read twice."""
    text = cut({"docs": make_tokens(75), "code": make_tokens(90, seed=1)}, 3)
    (batch, *_) = read = spread(text, 4, "DamageBudget")
    rows = np.concatenate([b.tokens_BxS[b.mask_BxS.any(1)] for b in read])
    assert batch.tokens_BxS.shape == text[0].tokens_BxS.shape and len(rows) == 4
    groups = [{b.group for b in text if (b.tokens_BxS == row).all(1).any()} for row in rows]
    assert groups[0] == {"docs"} and groups[-1] == {"code"}
