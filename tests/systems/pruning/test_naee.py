"""NAEE (arXiv:2402.14800) on nano: subsets, progressive or not, and skipping."""

import numpy as np
import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("pruning/naee", tmp_path_factory.mktemp("naee"), NANO)


def test_the_best_subset_loses_less_than_subsets_at_random(ran):
    """Catches a search for the worst, and a router whose columns are not those of its experts."""
    random = [ran.damage(arm) for arm in ran.starting("at random")]
    assert len(random) == 5
    assert ran.damage("best subset") < np.mean(random)


def test_all_of_them_store_the_same(ran):
    """Catches arms that win because they keep more."""
    arms = ("best subset", "best subset, progressive", "greedy subset", "by frequency")
    sizes = {ran.result.arm(arm).stored_bytes for arm in (*arms, *ran.starting("at random"))}
    assert len(sizes) == 1


def test_skipping_comes_on_top(ran):
    """Catches a threshold of the whole model used for the pruned one: it is not shared."""
    pruned, both = ran.result.arm("best subset"), ran.result.arm("best subset, then skipping")
    assert both.stored_bytes - pruned.stored_bytes == 4 * 2  # a threshold per layer
    assert both.average.perplexity != pruned.average.perplexity
    assert ran.damage("skipping alone") > 0
