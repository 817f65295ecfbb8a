import numpy as np

from moejax.report.traces import lru_hits


def test_hit_rates_are_those_of_an_lru_cache():
    """Catches a curve shifted by one expert, and first uses counted as hits."""
    # Of ten uses in a layer of three experts: two at distance 0, three at 1, one at 2, four first.
    np.testing.assert_allclose(lru_hits(np.array([[2, 3, 1, 4]])), [[0, 0.2, 0.5, 0.6]])
    assert lru_hits(np.zeros((2, 4), int)).shape == (2, 4)
