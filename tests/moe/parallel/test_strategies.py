"""Strategies against one device, their traffic before any compiler pass, and what they drop."""

from collections import Counter

import pytest

from tests.eight_devices import report_of
from tests.moe.parallel.contract import BANKS, FIRST, LOADS, QUICK, STRATEGIES, D, E, F, K, T


@pytest.fixture(scope="module")
def report():
    return report_of("tests.moe.parallel.contract")


@pytest.mark.parametrize("name", QUICK)
def test_every_format_gives_what_one_device_gives(report, name):
    """Catches rows sent to the wrong expert, scales left on another device than their words, a bias
    added once per part, gradients summed twice or not at all, padding that reaches an expert."""
    found = report["equal"][f"{name}, {FIRST}"]
    assert set(found) == set(LOADS)
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_all_banks_on_all_strategies():
    """Catches a strategy that is right for buckets alone, or for one way to cut the mesh."""
    found = report_of("tests.moe.parallel.contract", "--all")["equal"]
    assert len(found) == len(BANKS) * len(STRATEGIES)
    assert max(max(of.values()) for of in found.values()) < 1e-5, found


def traffic(report, name, way):
    """(Counter of (kind, axes) that carry rows of tokens, the others)."""
    rows, rest = Counter(), []
    for kind, axes, shape, dtype in report["traffic"][name][way]:
        if shape[-1] == D and dtype == "f32" and "fsdp" not in axes and shape[0] != E:
            rows[kind, axes] += 1
        else:
            rest.append((kind, axes, shape, dtype))
    return rows, rest


ROWS = {
    "ring": {("all_gather", "node expert"): 1, ("reduce_scatter", "node expert"): 1},
    "padded": {("all_to_all", "node expert"): 2},
    "ragged": {("ragged_all_to_all", "expert"): 2},
    "hierarchical": {("all_to_all", "node"): 2, ("all_to_all", "expert"): 2},
    "ted": {
        ("all_to_all", "expert"): 2,
        ("all_gather", "model"): 1,
        ("reduce_scatter", "model"): 1,
    },
    "ted, ragged": {
        ("ragged_all_to_all", "expert"): 2,
        ("all_gather", "model"): 1,
        ("reduce_scatter", "model"): 1,
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_travel_as_the_strategy_says_forward_and_back(report, name):
    """Catches an all-to-all per choice or per matrix, a second one for sizes, a flat one where two
    levels are claimed, and a backward pass that gathers what the forward pass exchanged."""
    forward, _ = traffic(report, name, "forward")
    assert forward == ROWS[name]
    both, _ = traffic(report, name, "both")
    exchanged = {key: 2 * count for key, count in ROWS[name].items()}
    assert {key: both[key] for key in exchanged} == exchanged
    # What is left are sums of the gradients of experts that several devices hold.
    assert {kind for kind, _ in set(both) - set(exchanged)} <= {"all_reduce"}


def test_what_travels_besides_rows_is_a_few_integers(report):
    """Catches expert numbers or gates sent once per row and column."""
    for name in ("padded", "hierarchical", "ragged", "ted"):
        _, rest = traffic(report, name, "forward")
        rest = [one for one in rest if "fsdp" not in one[1]]
        assert all(dtype == "i32" and shape[-1] <= 48 for _, _, shape, dtype in rest), rest
    _, rest = traffic(report, "ring", "forward")
    per_device = -(-T // 8)
    rest = [one for one in rest if "fsdp" not in one[1]]
    assert [shape for _, _, shape, _ in rest] == [[per_device, K]] * 2


def test_moving_experts_leave_tokens_where_they_are(report):
    """Catches any exchange of tokens, and experts that cross the slow axis behind the fast one."""
    for way, kinds in (("forward", {"all_gather"}), ("both", {"all_gather", "reduce_scatter"})):
        found = report["traffic"]["moving"][way]
        assert not [one for one in found if one[0] in ("all_to_all", "ragged_all_to_all")]
        moved = [one for one in found if one[0] in kinds and one[1] in ("node", "expert")]
        leaves = 6  # three matrices and three biases
        assert Counter((kind, axis) for kind, axis, _, _ in moved) == {
            (kind, axis): leaves for kind in kinds for axis in ("node", "expert")
        }
        largest = {
            axis: max(
                shape[-1] * shape[-2]
                for kind, at, shape, _ in moved
                if at == axis and kind == "all_gather"
            )
            for axis in ("node", "expert")
        }
        assert largest["node"] == D * F // 2  # still cut over fsdp


def test_ted_exchanges_its_share_of_the_tokens(report):
    """Catches an all-to-all that every device along `model` carries whole."""
    sizes = {}
    for name in ("padded, hidden cut", "ted"):
        found = report["traffic"][name]["forward"]
        sizes[name] = [shape for kind, _, shape, _ in found if kind == "all_to_all"]
    assert [N * C for N, C, _ in sizes["ted"]] == [4 * 3 * K] * 2
    assert [N * C for N, C, _ in sizes["padded, hidden cut"]] == [4 * 6 * K] * 2


def test_kept_rows_are_not_exchanged_again(report):
    """Catches names that no policy finds: communication-aware checkpointing (arXiv:2303.06318)."""
    exchanges = {
        name: sum(kind == "all_to_all" for kind, *_ in found)
        for name, found in report["rematerialised"].items()
    }
    assert exchanges == {"nothing": 12, "rows": 8}


def test_drops_are_those_of_one_device_and_counted(report):
    """Catches capacity per device where it is per batch, seconds before firsts, rows lost without
    being counted, and places in a block that another token holds."""
    for name, found in report["drops"].items():
        assert found["dropped"] == found["expected"] > 0, name
        assert found["distance"] < 1e-6, name
