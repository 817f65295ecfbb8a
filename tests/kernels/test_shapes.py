"""Group sizes are those of a router."""

from __future__ import annotations

import numpy as np
from moejax_kernels.shapes import MIXTRAL, OLMOE, SHAPES, ZIPF


def test_group_sizes_are_choices_of_distinct_experts():
    """Catches draws with replacement, where one expert gets more rows than there are tokens."""
    for shape in SHAPES:
        for skew in (0.0, ZIPF, 5.0):
            sizes = shape.group_sizes(skew)
            assert sizes.sum() == shape.rows and sizes.shape == (shape.experts,)
            assert sizes.max() <= shape.tokens


def test_skew_is_skewed():
    """Catches a skew that is not used, and a draw that depends on more than its seed."""
    shape = OLMOE.gate(4096)
    balanced, skewed = shape.group_sizes(0.0), shape.group_sizes(ZIPF)
    assert balanced.max() < 1.2 * balanced.mean() < skewed.max()
    np.testing.assert_array_equal(skewed, shape.group_sizes(ZIPF))
    assert (skewed != shape.group_sizes(ZIPF, seed=1)).any()


def test_products_have_the_published_widths():
    """Catches gate and down exchanged."""
    gate, down = MIXTRAL.gate(8), MIXTRAL.down(8)
    assert (gate.inputs, gate.outputs, gate.experts) == (4096, 14336, 8)
    assert (down.inputs, down.outputs, down.rows) == (14336, 4096, 16)
    assert gate.flops == down.flops == 2 * 16 * 4096 * 14336
