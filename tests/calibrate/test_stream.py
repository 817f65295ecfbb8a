"""The layer walk: the text one layer at a time is the text through the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import (
    Calibration,
    ExpertCounts,
    GateMass,
    LayerInputs,
    LayerStream,
    SecondMoments,
    collect,
    collect_part,
    stream,
)
from moejax.calibrate.spool import DiskSpool
from moejax.calibrate.stream import stream_shapes
from moejax.calibrate.text import calibration_text
from moejax.core import MoejaxError, compat, taps
from moejax.models import layers, parameters
from moejax.models.decoder import layer
from tests.evaluate.conftest import cut, dense, make_model, make_spec, make_tokens, padded, routed
from tests.evaluate.conftest import run as forward

CHOSEN = (ExpertCounts(), SecondMoments(), LayerInputs(tokens=20))


def assert_close(mine, theirs):
    """The same statistics in every layer, to 1e-5 of the largest entry."""
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            np.testing.assert_allclose(a[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


@pytest.fixture(scope="module")
def model():
    return make_model(3, make_spec(routed(), routed(), dense()))


@pytest.fixture(scope="module")
def text():
    return [*cut({"docs": make_tokens(75)}, 3), *cut({"code": make_tokens(40, 1)}, 3)]


@pytest.fixture(scope="module")
def found(model, text):
    return collect(model, text, CHOSEN)


def test_the_walk_sees_what_the_whole_model_sees(model, text, found):
    """Catches other positions, masks or router contexts, and layers that are skipped or doubled."""
    request = frozenset({taps.FFN_INPUT, taps.ROUTING})
    inputs = [[] for _ in model.spec.layers]
    counts = [np.zeros(6, int) for _ in model.spec.layers]
    for batch in text:
        output = forward(model, batch, request)
        for index, tapped in enumerate(output.taps):
            mask_T = batch.mask_BxS.reshape(-1)
            inputs[index].append(np.asarray(tapped[taps.FFN_INPUT])[mask_T])
            if index < 2:
                counts[index] += np.asarray(output.routings[index].counts_E(), int)
    for index in range(3):
        rows, every = found.of(index, LayerInputs(tokens=20)), np.concatenate(inputs[index])
        distance = np.linalg.norm(rows[:, None] - every[None], axis=-1).min(1)
        assert distance.max() < 1e-4 * np.linalg.norm(every[0])
        if index < 2:
            np.testing.assert_array_equal(found.of(index, ExpertCounts()), counts[index])
            trace = np.einsum("ekk->", found.of(index, SecondMoments()).astype(float))
            assert trace == pytest.approx(2 * np.square(every).sum(), rel=1e-4)
    assert set(found.layers[2]) == {LayerInputs(tokens=20).name}


def test_one_layer_of_a_model_is_that_layer(model):
    """Catches an index that counts runs."""
    for index, block in enumerate(layers(model)):
        mine = jax.tree.leaves(dataclasses.asdict(layer(model, index).spec))
        assert mine == jax.tree.leaves(dataclasses.asdict(block.spec))
    named = parameters(model)
    gate = compat.read(layer(model, 1).moe.experts.gate)
    np.testing.assert_array_equal(gate, named["layers.1.moe.experts.gate"])
    np.testing.assert_array_equal(compat.read(layer(model, 2).ffn.gate), named["layers.2.ffn.gate"])


def test_layers_are_collected_and_passed_one_by_one(model, text, found):
    """Catches a stream that a collection moves, and an advance through another block."""
    with Calibration(text).stream(model) as at:
        for index, block in enumerate(layers(model)):
            assert_close([at.collect(block, CHOSEN)], [found.layers[index]])
            at.advance(block)
        assert at.layer == 3


def test_batch_size_and_padding_change_nothing(model, text, found):
    """Catches token numbers that count padding, and sums that forget a batch."""
    other = [
        *(padded(b, 1, 3) for b in cut({"docs": make_tokens(75)}, 2)),
        *cut({"code": make_tokens(40, 1)}, 1),
    ]
    assert_close(collect(model, other, CHOSEN).layers, found.layers)


def test_parts_of_a_text_join_into_the_whole(model, text, found):
    """Catches means of means, a sample of the first part alone, and parts that overlap."""
    first = collect_part(model, text[:2], CHOSEN)
    second = collect_part(model, text[2:], CHOSEN, first_token=first.text.tokens)
    joined = second.joined(first).statistics()
    assert joined.tokens == found.tokens and joined.fingerprint == found.fingerprint
    assert_close(joined.layers, found.layers)
    with pytest.raises(MoejaxError, match="both hold token 0"):
        first.joined(collect_part(model, text[2:], CHOSEN))
    with pytest.raises(MoejaxError, match="different models"):
        first.joined(collect_part(model, text[2:], (GateMass(),), first_token=75))


def test_equal_layers_share_a_program(text, monkeypatch):
    """Catches a program per layer, or per batch."""
    traced = []
    real = stream.run_block

    def watched(*args):
        traced.append(args[1].shape)
        return real(*args)

    monkeypatch.setattr(stream, "run_block", watched)
    model = make_model(4, make_spec(*[routed(4)] * 4))
    collect(model, text, (GateMass(),))
    assert traced == [(3, 16, 32)]


def test_what_is_not_finite_is_named(model, text):
    """Catches NaN in a table, a batch number of another device, and padding that is blamed."""
    broken = make_model(3, model.spec)
    docs = {*text[0].tokens_BxS.flat, *text[1].tokens_BxS.flat}
    only_code = next(t for t in text[2].tokens_BxS[text[2].mask_BxS] if t not in docs)
    table = compat.read(broken.embed)
    compat.write(broken.embed, table.at[only_code].set(jnp.inf))
    with pytest.raises(MoejaxError, match=r"layer 0 is not finite, first in batch 2 .* 'code'"):
        collect(broken, text, CHOSEN)
    twice = jax.devices()[:1] * 2
    with pytest.raises(MoejaxError, match=r"first in batch 2 .* 'code'"):
        Calibration(text, devices=twice)(broken, CHOSEN)


def test_a_spool_on_disk_is_a_spool_in_memory(model, text, found, tmp_path):
    """Catches batches of different shapes read at wrong offsets, and damage that is not seen."""
    taken = calibration_text([*text[:2], padded(text[2], 2, 1), *text[3:]])
    spool = DiskSpool(tmp_path, stream_shapes(taken, 32), jnp.bfloat16)
    options = {"dtype": jnp.bfloat16}
    with (
        LayerStream(model, taken, spool=spool, **options) as on_disk,
        LayerStream(model, taken, **options) as in_memory,
    ):
        for index in range(3):
            block = layer(model, index)
            mine, theirs = on_disk.through(block, CHOSEN), in_memory.through(block, CHOSEN)
            for name, value in theirs.items():
                np.testing.assert_array_equal(mine[name], value)
            if index == 1:
                (tmp_path / ".inputs-9.bin.x.part").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs-2.bin", "inputs-3.bin"]
    assert spool.go_to(2) and spool.layers() == [3, 2]
    content = bytearray((tmp_path / "inputs-3.bin").read_bytes())
    content[1000] ^= 1
    (tmp_path / "inputs-3.bin").write_bytes(content)
    assert not spool.go_to(3)
    (tmp_path / "inputs-2.bin").write_bytes(content[:-1])
    assert not spool.go_to(2) and not spool.go_to(1)
