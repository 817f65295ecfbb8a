"""Shards of a model folder: each fault of index and files is named; parts are read alone."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import CheckpointError
from moejax.files import open_tensors, write_safetensors
from tests.files.folders import INDEX, index, shards, write_index

A, B = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(5, np.float16)


@pytest.fixture
def folder(tmp_path):
    return shards(tmp_path / "model", {"a": A}, {"b": B})


def test_parts_of_tensors_are_read_from_their_shards(folder):
    """Catches rows taken at the wrong offset, and a scalar or an empty part that changes shape."""
    found = open_tensors(folder)
    assert set(found) == {"a", "b"} and found["a"].shape == (4, 3)
    np.testing.assert_array_equal(found["a"].read(1, 3), A[1:3])
    np.testing.assert_array_equal(found["a"].read(), A)
    assert found["a"].read(2, 2).shape == (0, 3)
    assert found["b"].dtype == np.float16 and found.nbytes == A.nbytes + B.nbytes
    write_safetensors(folder / "one.safetensors", {"s": np.float32(2)})
    assert open_tensors(folder / "one.safetensors")["s"].read() == 2


def test_one_file_needs_no_index(tmp_path):
    """Catches a reader that knows sharded folders only."""
    write_safetensors(tmp_path / "model.safetensors", {"a": A})
    assert list(open_tensors(tmp_path)) == ["a"]


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        open_tensors(folder)


def test_a_missing_shard_is_named(folder):
    """Catches a reader that loads the shards it finds."""
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "lacks the shard model-00002-of-00002")


def test_an_absent_tensor_is_named(folder):
    """Catches an index believed without a look at the headers."""
    write_index(folder, index(folder) | {"c": "model-00001-of-00002.safetensors"})
    refused(folder, "names c in model-00001")


def test_a_tensor_in_no_index_is_named(folder):
    """Catches tensors of a shard that are silently dropped."""
    place = index(folder)
    write_safetensors(folder / place["b"], {"b": B, "stray": B})
    refused(folder, "stray, which .* does not name")


def test_a_tensor_in_two_shards_is_named(folder):
    """Catches the last shard winning over the first."""
    write_safetensors(folder / index(folder)["b"], {"b": B, "a": A})
    refused(folder, "a is in .* and again in|says that a is in")


def test_a_tensor_in_another_shard_than_said_is_named(folder):
    """Catches shards of two revisions mixed."""
    place = index(folder)
    write_index(folder, {"a": place["b"], "b": place["a"]})
    refused(folder, "says that")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors",
             ".safetensors", "x.json", "", "C:x.safetensors", "x\0.safetensors"]
)  # fmt: skip
def test_an_index_may_not_lead_elsewhere(folder, file):
    """Catches a path traversal: a file outside of the folder read as part of the model."""
    write_index(folder, {"a": file})
    refused(folder, "no safetensors file of its folder")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "x.pt", "x.pkl"])
def test_pickles_are_refused(tmp_path, folder, file):
    """Catches a pickle named by an index, or a folder of pickles called merely empty."""
    write_index(folder, {"a": file})
    refused(folder, "pickle")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is a pickle"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin is a pickle"),
        ("consolidated.00.pth", "consolidated.00.pth is a pickle"),
    ],
)
def test_a_folder_of_pickles_alone_is_refused_by_their_names(tmp_path, file, named):
    """Catches an error that names a file which is not there."""
    (tmp_path / file).write_bytes(b"")
    refused(tmp_path, named)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 20_000,
     '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'],
)  # fmt: skip
def test_a_damaged_index_is_named(folder, text):
    """Catches raw JSON errors, and a name placed twice of which the last place wins."""
    (folder / INDEX).write_text(text)
    refused(folder, "index.json")


@given(text=st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["weight_map", "a", "b"]), inner, max_size=3
    ),
    max_leaves=8,
))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_index_gives_named_errors_only(tmp_path_factory, text):
    """Catches raw exceptions for an index of any JSON."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps(text))
    with contextlib.suppress(CheckpointError):
        assert open_tensors(folder) == {}  # an empty weight_map is an empty model


def test_a_folder_without_tensors_says_what_it_wants(tmp_path):
    """Catches an empty model made of an empty folder."""
    refused(tmp_path, "has neither")


def test_a_file_that_shrinks_while_it_is_read_is_named(folder):
    """Catches a part filled with garbage when a file was replaced."""
    found = open_tensors(folder)["a"]
    found.path.write_bytes(found.path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="shorter"):
        found.read()
