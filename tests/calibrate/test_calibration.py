"""The cache: what is on disk is not computed again, and what is damaged is."""

import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import (
    ByGroup,
    Calibration,
    ExpertCounts,
    GateMass,
    GateWeighted,
    SecondMoments,
    calibration,
    store,
)
from moejax.core import RunError, compat, from_json, to_json
from tests.evaluate.conftest import cut, make_model, make_tokens

BOTH = (ExpertCounts(), SecondMoments())


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture(scope="module")
def text():
    return cut({"docs": make_tokens(75)}, 3)


@pytest.fixture(scope="module")
def expected(model, text):
    return Calibration(text)(model, BOTH)


@pytest.fixture
def walked(monkeypatch):
    """Names of what every walk collected, layer by layer."""
    seen = []

    class Watched(calibration.LayerStream):
        def accumulate(self, block, accumulators, *, onward):
            seen.append((self.layer, *(a.name for a in accumulators)))
            return super().accumulate(block, accumulators, onward=onward)

    monkeypatch.setattr(calibration, "LayerStream", Watched)
    return seen


def assert_equal(a, b):
    assert a.tokens == b.tokens and a.fingerprint == b.fingerprint
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(mine[name], value)
            assert mine[name].dtype == value.dtype


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_only_what_is_unknown_is_collected(model, text, expected, walked, tmp_path):
    """Catches a pass per arm, a pass for what is on disk, and a spool that stays."""
    first = Calibration(text, cache=tmp_path)
    assert_equal(first(model, BOTH), expected)
    assert_equal(first(model, BOTH), expected)
    assert len(walked) == 2
    assert_equal(Calibration(text, cache=tmp_path)(model, BOTH), expected)
    assert len(walked) == 2
    more = Calibration(text, cache=tmp_path)(model, (*BOTH, GateMass()))
    assert walked[2:] == [(0, "gate_mass"), (1, "gate_mass")]
    assert_equal(more.only([a.name for a in BOTH]).joined(more), more.joined(more))
    assert not any((tmp_path / "walks").iterdir())
    assert len(files(tmp_path)) == 2 * 3


def test_a_model_is_known_as_long_as_it_is_the_same(model, text, walked):
    """Catches statistics of the weights that a model had before."""
    mine, source = make_model(1), Calibration(text)
    before = source(mine, BOTH)
    source(mine, BOTH[:1])
    assert len(walked) == 2
    embed = compat.read(mine.embed)
    compat.write(mine.embed, embed.at[:, 0].add(1.0))
    after = source(mine, BOTH)
    assert len(walked) == 4 and after.fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", ["flip", "cut", "other", "empty"])
def test_a_damaged_file_is_collected_again(model, text, expected, walked, tmp_path, damage):
    """Catches a file that is trusted because it is there."""
    Calibration(text, cache=tmp_path)(model, BOTH)
    victim, *others = files(tmp_path)
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "cut":
        del content[-3:]
    elif damage == "other":
        content = others[0].read_bytes()
    else:
        content = b""
    victim.write_bytes(content)
    del walked[:]
    assert_equal(Calibration(text, cache=tmp_path)(model, BOTH), expected)
    collected = [name for _, *names in walked for name in names]
    assert len(collected) == 1 and not list((tmp_path / "walks").iterdir())
    del walked[:]
    Calibration(text, cache=tmp_path)(model, BOTH)
    assert not walked


def test_keys_tell_texts_models_and_accumulators_apart(model, text, tmp_path):
    """Catches a group's name, a dtype or a weight that a key does not see."""
    source = Calibration(text, cache=tmp_path)
    source(model, (ExpertCounts(),))
    count = len(files(tmp_path))
    renamed = [batch._replace(group="code") for batch in text]
    for other in (
        Calibration(renamed, cache=tmp_path),
        Calibration(text, dtype=jnp.bfloat16, cache=tmp_path),
    ):
        other(model, (ExpertCounts(),))
        assert len(files(tmp_path)) == (count := count + 2)
    source(make_model(1), (ExpertCounts(),))
    assert len(files(tmp_path)) == count + 2


def test_a_full_disk_is_an_error_that_says_so(model, text, tmp_path, monkeypatch):
    """Catches a traceback, a half-written file, and a walk that cannot go on afterwards."""

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left"):
            Calibration(text, cache=tmp_path)(model, BOTH)
    assert not [p for p in files(tmp_path) if p.suffix in (".part", ".safetensors")]
    found = Calibration(text, cache=tmp_path)(model, BOTH)
    assert found.of(1, ExpertCounts()).sum() == 2 * 75


@pytest.mark.parametrize(
    "value",
    [
        np.arange(600_000, dtype=np.float32).reshape(6, 100_000),
        np.broadcast_to(np.ones((1, 3, 3), np.float32), (4, 3, 3)),
        np.asarray(0.25),
        np.zeros((0, 8), np.float32),
        np.asarray([1, 2, 3], np.int64),
    ],
    ids=["mapped", "broadcast", "scalar", "empty", "int64"],
)
def test_statistics_come_back_from_disk(value, tmp_path):
    """Catches shapes that are lost, copies of what should be mapped, and keys that are not seen."""
    key = "ab" * 32
    written = store.write_statistic(tmp_path, key, value)
    read = store.read_statistic(tmp_path, key)
    for found in (written, read):
        np.testing.assert_array_equal(found, value)
        assert found.dtype == value.dtype and found.shape == value.shape
        assert isinstance(found, np.memmap) == (value.nbytes >= store.MAPPED_BYTES)
    path = store.statistic_path(tmp_path, key)
    other = store.statistic_path(tmp_path, "cd" * 32)
    other.parent.mkdir(parents=True)
    other.write_bytes(path.read_bytes())
    assert store.read_statistic(tmp_path, "cd" * 32) is None


def test_accumulators_travel_as_json():
    """Catches an accumulator that a config or a cache key cannot hold."""
    nested = ByGroup(of=SecondMoments(tap="expert_hidden", rows=GateWeighted()), groups=("a", "b"))
    assert from_json(to_json(nested)) == nested
