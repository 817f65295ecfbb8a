"""The sequential driver: every layer sees what the compressed layers before it give."""

import numpy as np

from moejax.calibrate import SecondMoments
from moejax.compress import GPTQ, Quantize, Sequential
from moejax.core import spec
from moejax.models import layers, parameters, with_layers
from moejax.weights import AsymmetricGrid
from tests.compress.conftest import LAYERS, apply, assert_same_weights

GRID = AsymmetricGrid(bits=2, group=16)
STEP = Quantize(grid=GRID, method=GPTQ(least_tokens=0.0))
MOMENTS = SecondMoments(tap="expert_input")


def test_the_first_layer_is_that_of_one_shot_and_the_second_is_not(applied):
    """Catches a driver that streams the text through the layers as they were."""
    (one, _), (two, _) = applied(STEP), applied(Sequential(step=STEP))
    for matrix in ("gate", "up", "down"):
        name = "layers.{}.moe.experts." + matrix
        same = [
            np.array_equal(
                parameters(one)[name.format(i)].words, parameters(two)[name.format(i)].words
            )
            for i in range(LAYERS)
        ]
        assert same == [True, False]


def test_a_layer_sees_the_compressed_prefix(model, source, applied):
    """Catches statistics of the right layer on the wrong inputs."""
    seen = []

    @spec
    class Watched(Quantize):
        def layer_needs(self, model):
            return (*super().layer_needs(model), MOMENTS)

        def apply_layer(self, index, block, plan, stats, key):
            seen.append(np.asarray(stats[MOMENTS.name]))
            return super().apply_layer(index, block, plan, stats, key)

    watched = Watched(grid=GRID, method=GPTQ(least_tokens=0.0))
    after, _ = apply(model, [Sequential(step=watched)], source)
    half = with_layers(model, [layers(after)[0], layers(model)[1]])
    wanted = source(half, (MOMENTS,))
    np.testing.assert_allclose(seen[1], wanted.of(1, MOMENTS), rtol=1e-4, atol=1e-4)


def test_what_needs_no_statistics_is_the_same_either_way(applied):
    """Catches a sequential driver that changes more than the statistics."""
    nearest = Quantize(grid=GRID)
    (one, rows), (two, same) = applied(nearest), applied(Sequential(step=nearest))
    assert_same_weights(one, two)
    assert [r.relative_error for r in rows] == [r.relative_error for r in same]
    assert [r.pass_name for r in same] == [r.pass_name for r in rows]


def test_nothing_is_collected_of_the_whole_model(model, source):
    """Catches a calibration of all layers whose result nobody reads."""
    apply(model, [Sequential(step=STEP)], source)
    assert source.asked == []
