"""SEER-MoE's counts (arXiv:2404.05089) on nano."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("pruning/seer_moe", tmp_path_factory.mktemp("seer_moe"), NANO)


def test_the_heavy_hitters_stay(ran):
    """Catches counts read upside down: nobody that stays has fewer tokens than one that goes."""
    rows = [r for r in ran.ledger.last("hard counts, each layer").values() if "up" in r.matrix]
    for layer in range(2):
        gone = [row.tokens for row in rows if row.layer == layer and row.dropped]
        left = [row.tokens for row in rows if row.layer == layer and not row.dropped]
        assert len(gone) == 2 and max(gone) <= min(left)


def test_all_layers_together_drop_as_many(ran):
    """Catches a floor that is a share, and a global count that is a share of each layer."""
    for arm in ("hard counts, all layers", "soft counts, all layers"):
        rows = [r for r in ran.ledger.last(arm).values() if "up" in r.matrix]
        assert sum(row.dropped for row in rows) == 4
        for layer in range(2):
            assert sum(not row.dropped for row in rows if row.layer == layer) >= 2
        tokens = {row.dropped: [] for row in rows}
        for row in rows:
            tokens[row.dropped].append(row.tokens)
        if arm.startswith("hard"):
            assert max(tokens[True]) <= min(tokens[False])


def test_everybody_stores_the_same(ran):
    """Catches controls of another size."""
    assert len({arm.stored_bytes for arm in ran.result.arms if arm.base}) == 1
