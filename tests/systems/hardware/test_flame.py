"""FLAME's N:M sparsity on nano."""

import pytest

from tests.systems.running import NANO, run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("hardware/flame", tmp_path_factory.mktemp("flame"), NANO)


@pytest.mark.parametrize(
    ("arm", "n", "m", "place"),
    [("2:4", 2, 4, 2), ("1:4", 1, 4, 2), ("4:8", 4, 8, 3), ("8:16", 8, 16, 4)],
)
def test_bytes_are_those_of_values_and_places(ran, arm, n, m, place):
    """Catches places in whole bytes, and values that are kept where they are zero."""
    assert ran.result.arm(arm).bits_per_weight == pytest.approx(n / m * (16 + place))


def test_less_is_lost_where_more_may_be_chosen(ran):
    """Catches groups that run along the outputs: larger groups of as many choices hold the best of
    smaller ones."""
    errors = [
        sum(row.relative_error for row in ran.ledger.last(arm).values())
        for arm in ("1:4", "2:4", "4:8", "8:16", "50 %, anywhere")
    ]
    assert errors == sorted(errors, reverse=True)
