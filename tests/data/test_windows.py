"""Evaluation windows: every token is a target once, with nothing but its own window before it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import DataError
from moejax.data import windows


@given(count=st.integers(0, 60), length=st.integers(1, 9), batch=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_token_is_predicted_exactly_once(count, length, batch):
    """Catches a lost first token or tail, and padding that is counted."""
    tokens = np.arange(1, count + 1, dtype=np.uint16)
    batches = list(windows(tokens, length, batch, group="docs", end_of_document=77))
    targets = [b.targets_BxS[b.mask_BxS] for b in batches]
    np.testing.assert_array_equal(np.concatenate([*targets, np.zeros(0, int)]), tokens)
    assert all(b.tokens_BxS.shape == (batch, length) and b.group == "docs" for b in batches)


def test_windows_start_with_end_of_document_and_see_their_own_targets_only():
    """Catches inputs that hold their own target, or the last token of another window."""
    (batch,) = windows(np.arange(1, 7), 4, 2, end_of_document=77)
    assert batch.tokens_BxS.tolist() == [[77, 1, 2, 3], [77, 5, 6, 77]]
    assert batch.targets_BxS.tolist() == [[1, 2, 3, 4], [5, 6, 77, 77]]
    assert batch.mask_BxS.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.tokens_BxS.dtype == np.int32


def test_windows_that_hold_nothing_are_refused():
    """Catches an endless loop or an empty evaluation that reports perplexity 1."""
    with pytest.raises(DataError, match="length 0"):
        next(windows(np.arange(5), 0, 2))
