"""Headers of safetensors files: what is damaged is named; nothing else is ever raised."""

import json
import tracemalloc

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import CheckpointError
from moejax.files import read_header, write_safetensors
from moejax.files.header import unique


def whole_file() -> dict[str, np.ndarray]:
    return {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "v": np.ones(3, np.float16)}


def with_header(path, header, data=b"\0" * 24):
    """A file with that header, given as text or as what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


def test_files_equal_those_of_the_library(tmp_path):
    """Catches a writer whose files others read as misaligned, or not at all."""
    tensors = whole_file() | {"é": np.zeros((0, 2), np.int8), "s": np.float64(3)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    specs = {
        name: safetensors.TensorSpec(
            dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for name, a in ((name, np.asarray(a)) for name, a in tensors.items())
    }
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.serialize(
        specs, metadata={"format": "pt"}
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 20_000, "no JSON"),
        (b"[]", "no table of tensors"),
        (b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"w":{}}', "'w' twice"),
        ({"w": {"dtype": "F32"}}, "'w' lacks"),
        ({"w": 3}, "'w' lacks"),
        ({"w": entry(dtype="F4")}, "dtype 'F4'"),
        ({"w": entry(dtype=["F32"])}, "dtype"),
        ({"w": entry(shape=[2, -3])}, "shape"),
        ({"w": entry(shape=[True, 6])}, "shape"),
        ({"w": entry(shape=[6.0])}, "shape"),
        ({"w": entry(shape=[1] * 64)}, "shape"),
        ({"w": entry(shape=[1 << 62, 1 << 62])}, "its shape"),
        ({"w": entry(shape=[2, 4])}, "its shape"),
        ({"w": entry(data_offsets=[24, 0])}, "'w' has -24 bytes"),
        ({"w": entry(data_offsets=[-24, 0])}, "data_offsets"),
        ({"w": entry(data_offsets=[0, 1 << 70])}, "data_offsets"),
        ({"w": entry(data_offsets=[8, 32])}, "hole"),
        ({"w": entry(shape=[3], data_offsets=[0, 12])}, "belong to no tensor"),
        ({"w": entry(), "v": entry(data_offsets=[0, 24])}, "overlaps"),
        ({"w": entry(), "v": entry(data_offsets=[24, 48])}, "behind the end"),
        ({"w": entry(), "__metadata__": {"a": 1}}, "table of strings"),
    ],
)
def test_a_damaged_header_has_an_error_of_its_name(tmp_path, header, message):
    """Catches a parser that believes offsets, shapes or a second entry of the same name."""
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(with_header(tmp_path / "a.safetensors", header))
    assert "a.safetensors" in caught.value.problem


def test_one_equal_name_among_many_is_found_at_once():
    """Catches a search that compares every name with every other: hours for a large header."""

    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

    names = [Name(i) for i in range(2000)]
    with pytest.raises(CheckpointError, match="'1999' twice"):
        unique([(name, None) for name in [*names, Name(1999)]])
    assert Name.compared < 10 * len(names)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """Catches an offset at which a truncated file passes, or fails with an error of Python's."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, whole_file())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            read_header(path)


def test_a_huge_claim_costs_no_memory(tmp_path):
    """Catches a reader that allocates what a header claims before it looks at the file's size."""
    path = tmp_path / "a.safetensors"
    for claim in (1 << 63, 100_000_000, 99):
        path.write_bytes(claim.to_bytes(8, "little") + b"{}")
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="header claims"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_damage_gives_anything_but_named_errors(tmp_path_factory, data):
    """Catches raw exceptions: flipped, inserted or removed bytes, and any JSON as the header."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    write_safetensors(path, whole_file(), {"format": "pt"})
    bytes_ = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(bytes_) - 1))
            bytes_[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        path.write_bytes(bytes(bytes_))
    else:
        scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        inner = st.lists(scalars, max_size=3) | scalars
        fields = st.sampled_from(["dtype", "shape", "data_offsets", "x"])
        tensors = st.dictionaries(st.text(max_size=3), st.dictionaries(fields, inner) | inner)
        with_header(path, data.draw(tensors))
    try:
        header = read_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(0 <= t.offset <= t.offset + t.nbytes <= size for t in header.tensors.values())


def test_a_pickle_is_never_opened(tmp_path):
    """Catches a fallback to pickles, which run what they hold."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match="pickle"):
        read_header(tmp_path / "pytorch_model.bin")
