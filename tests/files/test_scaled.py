"""Codes and scales as the floats they stand for, against the definitions written out."""

import ml_dtypes
import numpy as np
import pytest

from moejax.core.errors import CheckpointError
from moejax.files import as_floats, open_tensors, write_safetensors

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def stored(tmp_path, **tensors):
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", named)
    return as_floats(open_tensors(tmp_path))


def test_float8_blocks_are_multiplied_by_their_scales(tmp_path):
    """Catches a division by scale_inv, scales taken transposed, and a last block that is short."""
    random = np.random.default_rng(0)
    codes = random.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scales = random.uniform(0.5, 2, (2, 3)).astype(np.float32)
    found = stored(tmp_path, x__weight=codes, x__weight_scale_inv=scales, y=scales)
    exact = np.kron(scales, np.ones((128, 128), np.float32))[:200, :300] * codes.astype(np.float32)
    assert set(found) == {"x.weight", "y"}
    assert found["x.weight"].parts == ("x.weight", "x.weight_scale_inv")
    np.testing.assert_array_equal(found["x.weight"].read(), exact)
    np.testing.assert_array_equal(found["x.weight"].read(100, 190), exact[100:190])
    np.testing.assert_array_equal(found["x.weight"].read(130, 131), exact[130:131])


def test_mxfp4_takes_the_low_half_of_a_byte_first(tmp_path):
    """Catches swapped halves, an exponent without its bias of 127, and K and N exchanged."""
    random = np.random.default_rng(1)
    E, N, G = 3, 5, 2
    codes = random.integers(0, 256, (E, N, G, 16), np.uint8)
    exponents = random.integers(120, 135, (E, N, G), np.uint8)
    found = stored(tmp_path, e__w_blocks=codes, e__w_scales=exponents)
    exact = np.zeros((E, 32 * G, N), np.float32)
    for e in range(E):
        for n in range(N):
            for k in range(32 * G):
                byte = int(codes[e, n, k // 32, k % 32 // 2])
                value = FP4[byte >> 4 if k % 2 else byte & 15]
                exact[e, k, n] = value * 2.0 ** (int(exponents[e, n, k // 32]) - 127)
    assert found["e.w"].shape == exact.shape and found["e.w"].dtype == np.float32
    np.testing.assert_array_equal(found["e.w"].read(), exact)
    np.testing.assert_array_equal(found["e.w"].read(1, 2), exact[1:2])


@pytest.mark.parametrize(
    "change",
    [
        {"x__weight_scale_inv": np.ones((3, 2), np.float32)},
        {"x__weight_scale_inv": np.ones((2, 3), np.float16)},
        {"x__weight": np.ones((200, 300), np.float32)},
        {"x__weight": np.ones((200, 300), ml_dtypes.float8_e5m2)},
        {"x__weight": np.ones(200, ml_dtypes.float8_e4m3fn)},
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, change):
    """Catches scales of another block size applied to whatever they reach."""
    plain = {
        "x__weight": np.ones((200, 300), ml_dtypes.float8_e4m3fn),
        "x__weight_scale_inv": np.ones((2, 3), np.float32),
    }
    with pytest.raises(CheckpointError, match=r"x\.weight"):
        stored(tmp_path, **plain | change)


def test_float8_without_scales_is_refused(tmp_path):
    """Catches codes read as if every scale were one."""
    with pytest.raises(CheckpointError, match="x is float8"):
        stored(tmp_path, x=np.ones((2, 2), ml_dtypes.float8_e4m3fn))


def test_mxfp4_parts_that_do_not_fit_are_named(tmp_path):
    """Catches groups of another length."""
    with pytest.raises(CheckpointError, match="x_blocks"):
        stored(
            tmp_path,
            x_blocks=np.ones((2, 3, 4, 8), np.uint8),
            x_scales=np.ones((2, 3, 4), np.uint8),
        )


def test_a_weight_that_is_there_twice_is_refused(tmp_path):
    """Catches one of the two dropped without a word: as floats, and as codes with scales."""
    with pytest.raises(CheckpointError, match="hold x and, as MXFP4, x_blocks"):
        stored(
            tmp_path,
            x=np.ones((2, 128, 3), np.float32),
            x_blocks=np.ones((2, 3, 4, 16), np.uint8),
            x_scales=np.ones((2, 3, 4), np.uint8),
        )
