"""ShortGPT (arXiv:2403.03853) on nano: blocks by their influence."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("pruning/shortgpt", tmp_path_factory.mktemp("shortgpt"), NANO)


def test_one_block_goes_whole(ran):
    """Catches a dropped block that leaves a part, and controls of another size."""
    rows = ran.ledger.last("least influence, 1").values()
    assert len({row.layer for row in rows}) == 1 and all(row.dropped for row in rows)
    sizes = {ran.result.arm(a).stored_bytes for a in ran.starting("at random")}
    assert sizes == {ran.result.arm("least influence, 1").stored_bytes}


def test_a_model_without_blocks_is_still_one(ran):
    """Catches runs that cannot be empty: nano has two blocks."""
    assert ran.result.arm("least influence, 2").expert_bytes == 0
    assert ran.damage("least influence, 2") > ran.damage("least influence, 1") > 0
