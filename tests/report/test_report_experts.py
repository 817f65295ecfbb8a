"""Maps of experts: what is unknown is never drawn as perfect."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.axes import Axes

from moejax.report.experts import (
    ABSENT,
    DEAD,
    DROPPED,
    KEPT,
    UNCALIBRATED,
    draw_expert_map,
    expert_map,
)
from moejax.report.specialisation import chosen_layers, mutual_information
from moejax.report.totals import ledger_totals
from moejax.runs import Ledger, LedgerRow


def rows(expert: int, layer: int = 2, **facts) -> list[LedgerRow]:
    plain = LedgerRow(
        "a", "gptq", layer, expert, "up", tokens=90, code_bits=3.0, stored_bytes=300,
        relative_error=0.1,
    )  # fmt: skip
    up = dataclasses.replace(plain, **facts)
    return [up, dataclasses.replace(up, matrix="down")]


@pytest.fixture
def ledger() -> Ledger:
    """Layer 2 with an expert of each state; layer 5 with one expert; a matrix of no expert."""
    found = Ledger(rows(0))
    found.add(rows(1, tokens=3, calibrated=False, relative_error=0.0))
    found.add(rows(2, tokens=0, dead=True, calibrated=False, relative_error=0.0, fallback="rtn"))
    found.add(rows(3, code_bits=None, stored_bytes=0, relative_error=None, lineage=("dropped",)))
    found.add(rows(0, layer=5, relative_error=0.4))
    found.add([LedgerRow("a", "rtn", -1, None, "embed", code_bits=8.0, stored_bytes=50)])
    return found


def test_every_expert_has_the_state_that_the_ledger_gives(ledger):
    """Catches dead experts counted as calibrated, and layers shown at the wrong row."""
    found = expert_map(ledger, "a")
    assert found.layers == (2, 5)
    expected = [[KEPT, UNCALIBRATED, DEAD, DROPPED], [KEPT, ABSENT, ABSENT, ABSENT]]
    assert found.state.tolist() == expected
    assert found.tokens[0].tolist()[:3] == [90, 3, 0]
    assert np.isnan(found.code_bits[0, 3]) and found.code_bits[0, 0] == 3.0
    assert expert_map(ledger, "b") is None


def test_an_expert_without_tokens_never_shows_its_error(ledger, tmp_path, monkeypatch):
    """Catches an error of 0 over no tokens that is drawn as the best expert of all."""
    drawn = []
    original = Axes.imshow

    def remember(axes, values, *arguments, **options):
        drawn.append(values)
        return original(axes, values, *arguments, **options)

    monkeypatch.setattr(Axes, "imshow", remember)
    draw_expert_map(tmp_path / "a.png", expert_map(ledger, "a"), 0.4)
    bits, tokens, error = drawn
    assert error.mask[0].tolist() == [False, True, True, True]
    assert bits.mask[0].tolist() == tokens.mask[0].tolist() == [False, False, False, True]
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_bits_are_means_over_codes():
    """Catches a mean over matrices, which overrates the small one."""
    ledger = Ledger(
        [
            LedgerRow("a", "p", 0, 0, "up", code_bits=2.0, stored_bytes=300),
            LedgerRow("a", "p", 0, 0, "down", code_bits=8.0, stored_bytes=400),
        ]
    )
    assert expert_map(ledger, "a").code_bits[0, 0] == pytest.approx(8 * 700 / (8 * (150 + 50)))


def test_totals_count_experts_once_and_leave_unknown_errors_out(ledger):
    """Catches counts of matrices for experts, and a largest error of an expert without tokens."""
    ledger.add(rows(4, tokens=1, calibrated=False, relative_error=9.0))
    total = ledger_totals(ledger)["a"]
    assert (total.matrices, total.experts) == (13, 6)
    assert (total.dropped, total.dead, total.uncalibrated, total.fallbacks) == (1, 1, 2, 2)
    assert total.stored_bytes == 5 * 600 + 50
    assert (total.largest_error, total.where) == (0.4, "layer 5, expert 0, up")
    assert total.output_ratio is None


def test_output_errors_are_shares_of_those_of_rounding():
    """Catches a ratio of means, which large matrices rule, and experts whose statistics are few."""
    compared = [
        LedgerRow("a", "p", 0, e, "up", tokens=9, relative_error=0.1, **errors)
        for e, errors in enumerate(
            [
                {"output_error": 0.1, "nearest_error": 0.2},
                {"output_error": 3.0, "nearest_error": 4.0},
                {"output_error": 9.0, "nearest_error": 1.0, "calibrated": False},
            ]
        )
    ]
    assert ledger_totals(Ledger(compared))["a"].output_ratio == pytest.approx((0.5 + 0.75) / 2)


def test_mutual_information_knows_its_ends():
    """Catches shares taken without their groups' weights, or logarithms of another base."""
    alike = np.full((4, 8), 1 / 8)
    apart = np.eye(4)
    assert mutual_information(alike) == pytest.approx(0, abs=1e-12)
    assert mutual_information(apart) == pytest.approx(2)


@pytest.mark.parametrize("count", [1, 12, 13, 61])
def test_chosen_layers_keep_both_ends(count):
    """Catches a choice of the first twelve."""
    found = chosen_layers(list(range(count)))
    assert found[0] == 0 and found[-1] == count - 1 and len(found) == min(count, 12)
