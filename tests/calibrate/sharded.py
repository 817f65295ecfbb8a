"""Statistics over all devices of this process against those of one: `python sharded.py`."""

import jax
import numpy as np

from moejax.calibrate import (
    Calibration,
    ExpertCounts,
    GateMass,
    LayerInputs,
    SecondMoments,
)
from tests.evaluate.conftest import cut, make_model, make_tokens

CHOSEN = (ExpertCounts(), GateMass(), SecondMoments(), LayerInputs(tokens=12))

if __name__ == "__main__":
    assert len(jax.devices()) == 8
    model, text = make_model(0), cut({"docs": make_tokens(160)}, 1)
    assert len(text) == 10
    one = Calibration(text)(model, CHOSEN)
    many = Calibration(text, devices=jax.devices())(model, CHOSEN)
    for mine, theirs in zip(many.layers, one.layers, strict=True):
        for name, value in theirs.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1e-5 * scale)
    print("equal")
