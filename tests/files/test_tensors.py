"""Safetensors files: exact round trips, and clear refusals of damaged ones."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import CheckpointError
from moejax.files import (
    read_safetensors,
    safetensors_header,
    safetensors_metadata,
    write_safetensors,
)

DTYPES = ["bool", "uint8", "int8", "uint16", "int32", "uint32", "int64", "float16", "float32"]
EXTENSION_DTYPES = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", [*DTYPES, *EXTENSION_DTYPES])
def test_round_trip_keeps_bits_shape_and_dtype(tmp_path, dtype):
    """Catches bfloat16 read as uint16 or float32, and 0-d or empty arrays that change shape."""
    full = (np.arange(12) % 3).astype(dtype).reshape(3, 4)
    tensors = {"full": full, "scalar": full[0, 1], "empty": full[:0]}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    back = read_safetensors(tmp_path / "a.safetensors")
    assert set(back) == set(tensors)
    for name, array in tensors.items():
        assert back[name].dtype == np.dtype(dtype)
        assert back[name].shape == np.shape(array)
        assert back[name].tobytes() == np.asarray(array).tobytes()


def test_strided_and_big_endian_arrays_keep_their_values(tmp_path):
    """Catches writing the buffer of a transposed or byte-swapped array as it lies in memory."""
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"t": matrix.T, "s": matrix[:, ::2], "b": matrix.astype(">f4")})
    back = read_safetensors(path)
    np.testing.assert_array_equal(back["t"], matrix.T)
    np.testing.assert_array_equal(back["s"], matrix[:, ::2])
    np.testing.assert_array_equal(back["b"], matrix)


def test_header_and_metadata_without_the_data(tmp_path):
    """Catches a header reader that reports the file's dtype names or a wrong place of the data."""
    path = tmp_path / "a.safetensors"
    w = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    write_safetensors(path, {"w": w, "v": np.ones(5)}, {"format": "test"})
    entry = safetensors_header(path)["w"]
    assert (entry.shape, entry.dtype, entry.nbytes) == ((2, 3), w.dtype, 12)
    assert path.read_bytes()[entry.offset : entry.offset + 12] == w.tobytes()
    assert safetensors_metadata(path) == {"format": "test"}


@given(keep=st.floats(0, 1, exclude_max=True))
@settings(max_examples=25, deadline=None)
def test_truncated_file_is_refused_at_any_length(tmp_path_factory, keep):
    """Catches a reader that fills the missing end with zeros or fails with a raw exception."""
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    write_safetensors(path, {"w": np.ones((4, 4), np.float32), "v": np.zeros(3)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_safetensors(path)


def test_missing_tensor_and_missing_file_are_named(tmp_path):
    """Catches a KeyError or FileNotFoundError that does not say what the file holds."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"layers.0.w": np.ones(2), "layers.1.w": np.ones(2)})
    assert list(read_safetensors(path, ["layers.1.w"])) == ["layers.1.w"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.w") as caught:
        read_safetensors(path, ["layers.1.w", "layers.2.w"])
    assert "layers.0.w" in caught.value.fix
    with pytest.raises(CheckpointError, match="does not exist"):
        safetensors_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_found_in_every_float_dtype(tmp_path, dtype, bad):
    """Catches a finiteness check that skips bfloat16, whose NumPy kind is not 'f'."""
    path = tmp_path / "a.safetensors"
    array = np.ones(4, np.float32)
    array[2] = bad
    write_safetensors(path, {"i": np.ones(2, np.int8), "w": array.astype(dtype)})
    read_safetensors(path)
    with pytest.raises(CheckpointError, match="'w' holds 1 value"):
        read_safetensors(path, finite=True)


def test_dtype_outside_the_format_is_refused_and_keeps_the_old_file(tmp_path):
    """Catches 4-bit arrays saved as whole bytes under a wrong name, over a good file."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": np.ones(2)})
    with pytest.raises(CheckpointError, match="int4"):
        write_safetensors(path, {"w": np.ones(2, ml_dtypes.int4)})
    assert read_safetensors(path)["w"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
