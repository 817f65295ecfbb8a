"""GGUF files: every value and tensor type comes back, damage is named and costs no memory."""

import resource
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import CheckpointError
from moejax.files import GGUF
from tests.files import gguf_writer as w

METADATA = {
    "u8": (w.U8, 200),
    "i8": (w.I8, -100),
    "u16": (w.U16, 60_000),
    "i16": (w.I16, -30_000),
    "u32": (w.U32, 4_000_000_000),
    "i32": (w.I32, -2_000_000_000),
    "f32": (w.F32, 0.5),
    "bool": (w.BOOL, True),
    "string": (w.STRING, "größer"),
    "u64": (w.U64, 2**63),
    "i64": (w.I64, -(2**62)),
    "f64": (w.F64, 0.1),
    "numbers": (w.ARRAY, (w.I32, [1, -2, 3])),
    "flags": (w.ARRAY, (w.BOOL, [True, False])),
    "words": (w.ARRAY, (w.STRING, ["a", "", "日本"])),
    "nested": (w.ARRAY, (w.ARRAY, [(w.U8, [1, 2]), (w.STRING, ["x"])])),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The bytes of a small file with every value type and two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    q8, _ = w.quantized("Q8_0", (2, 32))
    w.write_gguf(path, METADATA, {"one": w.stored("F32", np.ones((3, 5))), "two": q8})
    return path.read_bytes()


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type_comes_back(tmp_path, version):
    """Catches a type read with another's width, a lost array, and nested arrays flattened."""
    w.write_gguf(tmp_path / "a.gguf", METADATA, {}, version=version)
    found = GGUF(tmp_path / "a.gguf").metadata
    for key, (kind, value) in METADATA.items():
        if kind != w.ARRAY:
            assert found[key] == value and type(found[key]) is type(value)
    assert found["numbers"].tolist() == [1, -2, 3]
    assert found["flags"].tolist() == [True, False]
    assert found["words"] == ["a", "", "日本"]
    assert found["nested"][0].tolist() == [1, 2] and found["nested"][1] == ["x"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized_blocks_decode_to_the_formula(tmp_path, kind):
    """Catches swapped nibble halves, unsigned int8, scale and minimum exchanged, and rows that
    are read from the wrong block."""
    tensor, values = w.quantized(kind, (6, 64), seed=3)
    path = tmp_path / "a.gguf"
    w.write_gguf(path, {}, {"before": w.stored("F32", np.ones(3)), "w": tensor})
    found = GGUF(path).tensors["w"]
    assert found.shape == (6, 64) and found.dtype == np.float32
    np.testing.assert_array_equal(found.read(), values)
    np.testing.assert_array_equal(found.read(2, 5), values[2:5])


def test_rows_of_a_vector_may_begin_within_a_block(tmp_path):
    """Catches a partial read that takes a block's first weights for those asked for."""
    tensor, values = w.quantized("Q8_0", (96,))
    w.write_gguf(tmp_path / "a.gguf", {}, {"w": tensor})
    np.testing.assert_array_equal(
        GGUF(tmp_path / "a.gguf").tensors["w"].read(40, 70), values[40:70]
    )


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_keep_shape_and_values(tmp_path, kind):
    """Catches extents that are not turned round (GGUF has the fastest first) and a wrong dtype."""
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    w.write_gguf(tmp_path / "a.gguf", {}, {"w": w.stored(kind, values)})
    tensor = GGUF(tmp_path / "a.gguf").tensors["w"]
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    assert tensor.dtype == tensor.read().dtype == kinds[kind]
    np.testing.assert_array_equal(tensor.read().astype(np.float32), values)


def test_the_alignment_of_the_file_is_used(tmp_path):
    """Catches a reader that takes 32 for granted."""
    values = np.arange(5, dtype=np.float32)
    metadata = {"general.alignment": (w.U32, 256)}
    tensors = {"a": w.stored("F32", values), "b": w.stored("F32", values + 5)}
    w.write_gguf(tmp_path / "a.gguf", metadata, tensors, alignment=256)
    np.testing.assert_array_equal(GGUF(tmp_path / "a.gguf").tensors["b"].read(), values + 5)


def test_a_type_that_is_not_read_is_named(tmp_path):
    """Catches a file refused for one tensor nobody asks for, and codes read as floats."""
    w.write_gguf(tmp_path / "a.gguf", {}, {"blk.0.w": ("Q6_K", (1, 256), bytes(210))})
    tensor = GGUF(tmp_path / "a.gguf").tensors["blk.0.w"]
    with pytest.raises(CheckpointError, match=r"'blk\.0\.w' has type Q6_K") as error:
        tensor.read()
    assert "Q8_0" in error.value.fix


def test_fields_are_checked_by_type(tmp_path):
    """Catches a string taken for a number, a bool for an int, and a missing key that gives None."""
    w.write_gguf(tmp_path / "a.gguf", METADATA, {})
    file = GGUF(tmp_path / "a.gguf")
    assert file.field("u8", int) == 200 and file.field("u8", float) == 200.0
    assert file.field("absent", int, 7) == 7
    for key, kind in (("string", int), ("bool", int), ("u8", bool), ("words", str)):
        with pytest.raises(CheckpointError, match=f"{key} is .* expected a value of type"):
            file.field(key, kind)
    with pytest.raises(CheckpointError, match="absent is missing"):
        file.field("absent", int)


HEAD = b"GGUF" + struct.pack("<I", 3)
HUGE = 2**60


def _pair(kind: int, payload: bytes) -> bytes:
    return HEAD + struct.pack("<QQ", 0, 1) + w.string("key") + struct.pack("<I", kind) + payload


def _tensor(extents, kind=0, offset=0, data=bytes(64), dimensions=None) -> bytes:
    entry = w.string("w") + struct.pack("<I", len(extents) if dimensions is None else dimensions)
    entry += b"".join(struct.pack("<Q", e) for e in extents) + struct.pack("<IQ", kind, offset)
    head = HEAD + struct.pack("<QQ", 1, 0) + entry
    return head + bytes(-len(head) % 32) + data


DAMAGED = {
    "is empty": b"",
    "no GGUF file": b"GGML" + bytes(40),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensor_count": HEAD + struct.pack("<QQ", HUGE, 0),
    "metadata_kv_count": HEAD + struct.pack("<QQ", 0, HUGE),
    "value type 13": _pair(13, bytes(8)),
    "element type 99": _pair(w.ARRAY, struct.pack("<IQ", 99, 1) + bytes(8)),
    "the value of key takes": _pair(w.STRING, struct.pack("<Q", HUGE)),
    "the length of key": _pair(w.ARRAY, struct.pack("<IQ", w.STRING, HUGE)),
    "no UTF-8": _pair(w.STRING, struct.pack("<Q", 1) + b"\xff"),
    "bool of value 2": _pair(w.BOOL, b"\x02"),
    "nests arrays deeper": _pair(w.ARRAY, struct.pack("<IQ", w.ARRAY, 1) * 40),
    "5 dimensions": _tensor([1], dimensions=5),
    "0 dimensions": _tensor([], dimensions=0),
    "empty shape": _tensor([4, 0]),
    "ends at byte": _tensor([HUGE, HUGE]),
    "rows of 31 weights": _tensor([31], kind=8),
    "no multiple of 32": _tensor([1], offset=4),
    "unknown type 77": _tensor([1], kind=77),
    "is no power of two": HEAD
    + struct.pack("<QQ", 0, 1)
    + w.string("general.alignment")
    + struct.pack("<II", w.U32, 48),
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_damage_is_named(tmp_path, problem):
    """Catches a count or size that is believed before it is compared with the file."""
    (tmp_path / "a.gguf").write_bytes(DAMAGED[problem])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=problem) as error:
        GGUF(tmp_path / "a.gguf")
    assert "a.gguf" in error.value.problem and error.value.fix
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


def test_names_and_places_are_taken_once(tmp_path):
    """Catches the later of two keys or tensors silently winning, and tensors that share bytes."""
    pair = w.string("key") + struct.pack("<IB", w.U8, 1)
    (tmp_path / "keys.gguf").write_bytes(HEAD + struct.pack("<QQ", 0, 2) + pair * 2)
    entries = [
        w.string(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in ("first", "second", "first")
    ]
    for file, names in (("tensors", (0, 2)), ("places", (0, 1))):
        head = HEAD + struct.pack("<QQ", 2, 0) + b"".join(entries[i] for i in names)
        (tmp_path / f"{file}.gguf").write_bytes(head + bytes(96))
    for file, problem in (("keys", "twice"), ("tensors", "twice"), ("places", "overlap")):
        with pytest.raises(CheckpointError, match=problem):
            GGUF(tmp_path / f"{file}.gguf")


def test_a_missing_file_is_named(tmp_path):
    """Catches a bare FileNotFoundError."""
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUF(tmp_path / "none.gguf")


def test_truncation_at_every_byte_is_an_error(tmp_path, whole):
    """Catches a header that is read past its end, and a tensor whose data is cut off."""
    path = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            GGUF(path)


@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
@settings(max_examples=400, deadline=None)
def test_changed_bytes_give_named_errors_only(tmp_path_factory, whole, changes):
    """Catches any other exception, a hang and an allocation beyond the file, in open and read."""
    damaged = bytearray(whole)
    for where, value in changes:
        damaged[where % len(whole)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(damaged)
    try:
        file = GGUF(path)
        assert sum(t.read().size for t in file.tensors.values()) <= 2 * len(whole)
    except CheckpointError as error:
        assert str(path) in error.problem and error.fix


def test_a_file_that_shrinks_is_an_error(tmp_path, whole):
    """Catches a tensor filled up with what was in memory, and a crash on a mapped page."""
    path = tmp_path / "a.gguf"
    path.write_bytes(whole)
    file = GGUF(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="became shorter"):
        file.tensors["two"].read()
