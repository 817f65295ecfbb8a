"""What every format of weights must do; the formats come from contract.py."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from moejax.core import CheckpointError, SpecError
from moejax.files import read_safetensors
from moejax.weights import (
    Format,
    abstract_from_meta,
    bits_per_weight,
    code_bits,
    concatenate,
    flatten,
    format_meta,
    grouped_matmul,
    logical_axes,
    materialize,
    matmul,
    nbytes,
    relative_error,
    shape,
    take,
    unflatten,
)

# Tests are no package: the list is loaded from the file beside this one.
_found = util.spec_from_file_location("weights_contract", Path(__file__).with_name("contract.py"))
contract = util.module_from_spec(_found)
_found.loader.exec_module(contract)
E, K, N = contract.E, contract.K, contract.N

SIZES = jnp.asarray([5, 0, 9, 1, 3], jnp.int32)
x_RxK = jnp.asarray(np.random.default_rng(9).standard_normal((20, K)), jnp.float32)


@lru_cache
def built(name, lead=(E,), seed=0):
    return dict(contract.FORMATS)[name](lead, seed)


@pytest.fixture(params=[name for name, _ in contract.FORMATS])
def name(request):
    return request.param


def product(w, offset=0):
    """float64 grouped product with exact weights [E, K, N]."""
    y, row = np.zeros((len(x_RxK), N)), 0
    for group, size in enumerate(np.asarray(SIZES)):
        if 0 <= group - offset < E:
            y[row : row + size] = np.float64(x_RxK)[row : row + size] @ w[group - offset]
        row += size
    return y


def test_value(name):
    """Catches codes, zeros, scales or members in the wrong place, and a wrong dtype."""
    w, exact = built(name)
    assert shape(w) == exact.shape == materialize(w).shape
    np.testing.assert_allclose(materialize(w), exact, rtol=1e-5, atol=1e-4)
    assert materialize(w, jnp.bfloat16).dtype == jnp.bfloat16


@jax.jit
def product_and_gradient(x, w, offset):
    def square(x):
        y = grouped_matmul(x, w, SIZES, group_offset=offset)
        return jnp.square(y).sum(), y

    (_, y), dx = jax.value_and_grad(square, has_aux=True)(x)
    return y, dx


def test_grouped_matmul_and_its_gradient(name):
    """Catches a product that differs from the materialised weight, or a wrong transpose."""
    w, exact = built(name)
    for offset in (0, 1):
        y, dx = product_and_gradient(x_RxK, w, offset)
        want = product(exact, offset)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
        wanted_dx, row = np.zeros(x_RxK.shape), 0
        for group, size in enumerate(np.asarray(SIZES)):
            if 0 <= group - offset < E:
                rows = slice(row, row + size)
                wanted_dx[rows] = 2 * want[rows] @ exact[group - offset].T
            row += size
        tolerance = 1e-4 * np.abs(wanted_dx).max()
        np.testing.assert_allclose(dx, wanted_dx, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("name", ["dense", "packed_2_symmetric", "low_rank", "sum", "buckets"])
def test_bfloat16_rounds_once(name):
    """Catches intermediate results kept in bfloat16: no error above a unit in the last place."""
    w, exact = built(name)
    x = x_RxK.astype(jnp.bfloat16)
    y = jax.jit(grouped_matmul)(x, w, SIZES)
    assert y.dtype == jnp.bfloat16
    want = jnp.float32(grouped_matmul(x.astype(jnp.float32), jnp.float32(exact), SIZES))
    np.testing.assert_allclose(np.float32(y), want, rtol=2**-8, atol=1e-5 * np.abs(want).max())


def test_matmul_of_one_matrix(name):
    """Catches a matmul that forgets leading axes of x, and experts taken at the wrong index."""
    w, exact = built(name)
    x = x_RxK.reshape(4, 5, K)
    for e in (0, E - 1):
        want = np.float64(x) @ exact[e]
        np.testing.assert_allclose(matmul(x, take(w, e)), want, rtol=1e-4, atol=1e-3)
    with pytest.raises(SpecError):
        matmul(x, w)


def test_bytes_are_those_of_the_file(name, tmp_path):
    """Catches sizes computed from the spec instead of the payload, and lost or renamed leaves."""
    w, _ = built(name)
    named = {leaf or "weight": np.asarray(array) for leaf, array in flatten(w).items()}
    content = safetensors.numpy.save(named)
    header = int.from_bytes(content[:8], "little")
    assert nbytes(w) == len(content) - 8 - header
    assert bits_per_weight(w) == 8 * nbytes(w) / (E * K * N)
    assert 0 < code_bits(w) <= bits_per_weight(w) + 1e-9
    meta = json.loads(json.dumps(format_meta(w)))
    path = tmp_path / "weight.safetensors"
    path.write_bytes(content)  # safetensors.numpy writes bfloat16 but does not read it
    loaded = {leaf.replace("weight", ""): a for leaf, a in read_safetensors(path).items()}
    again = unflatten(meta, loaded)
    assert jax.tree.structure(again) == jax.tree.structure(w)
    assert type(again) is type(w) or not isinstance(w, Format)
    np.testing.assert_array_equal(materialize(again), materialize(w))


def test_shapes_without_data(name):
    """Catches formats that look at values when they are built, or metadata without a dtype."""
    w, _ = built(name)
    abstract = jax.eval_shape(lambda w: w, w)
    assert format_meta(abstract) == format_meta(w)
    described = abstract_from_meta(format_meta(w))
    assert jax.tree.structure(described) == jax.tree.structure(w)
    assert jax.tree.leaves(described) == jax.tree.leaves(abstract)
    assert (shape(described), nbytes(described)) == (shape(w), nbytes(w))


def test_damaged_metadata_is_refused(name):
    """Catches a manifest with missing leaves, other shapes or unknown formats that loads anyway."""
    w, _ = built(name)
    meta = format_meta(w)
    leaf, array = next(iter(flatten(w).items()))
    with pytest.raises(CheckpointError, match="unknown"):
        abstract_from_meta({**meta, "format": "Nonsense"})
    with pytest.raises(CheckpointError):
        abstract_from_meta({**meta, "meta": {**meta["meta"], "surplus": 1}})
    with pytest.raises(CheckpointError):
        unflatten(meta, {})
    with pytest.raises(CheckpointError, match="manifest says"):
        unflatten(meta, {**flatten(w), leaf: array[..., :-1]})
    *needed, last = meta["leaves"]
    if "." not in last and last != "zero":  # a tuple less its last member is whole, as is no zero
        needed.append(last)
    for field in needed:
        rest = {k: v for k, v in meta["leaves"].items() if k != field}
        with pytest.raises(CheckpointError):
            abstract_from_meta({**meta, "leaves": rest})


def test_scan_and_vmap_over_layers(name):
    """Catches meta fields that hold a shape: they would be stale under the stacked axis."""
    stacked, exact = built(name, (2, E))
    assert shape(stacked) == (2, E, K, N)

    @jax.jit
    def both(stacked):
        def layer(x, w):
            y = grouped_matmul(x, w, SIZES)
            return x + 0.01 * jnp.pad(y, ((0, 0), (0, K - N))), y

        return jax.lax.scan(layer, x_RxK, stacked)[1], jax.vmap(materialize)(stacked)

    y_LxRxN, w_LxExKxN = both(stacked)
    first = product(exact[0])
    np.testing.assert_allclose(y_LxRxN[0], first, rtol=1e-4, atol=1e-4 * np.abs(first).max())
    np.testing.assert_allclose(w_LxExKxN, exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(materialize(take(stacked, 1)), exact[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["packed_3_asymmetric", "sum"])
def test_gradient_through_scan_and_checkpoint(name):
    """Catches integer leaves that break the backward scan, and layers decoded out of order."""
    stacked, exact = built(name, (2, E))

    def total(x, w):
        def layer(x, w):
            y = grouped_matmul(x, w, SIZES)
            return jnp.tanh(x + 0.1 * jnp.pad(y, ((0, 0), (0, K - N)))), None

        return jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()

    gradient = jax.jit(jax.grad(total))
    want = gradient(x_RxK, jnp.float32(exact))
    np.testing.assert_allclose(gradient(x_RxK, stacked), want, rtol=1e-3, atol=1e-4)


def test_take_and_concatenate(name):
    """Catches selections that move scales and codes apart, and joins in the wrong order."""
    w, exact = built(name)
    part = take(w, np.asarray([0, 2]))
    np.testing.assert_allclose(materialize(part), exact[[0, 2]], rtol=1e-5, atol=1e-4)
    other, other_exact = built(name, seed=7)
    joined = concatenate([w, other])
    both = np.concatenate([exact, other_exact])
    np.testing.assert_allclose(materialize(joined), both, rtol=1e-5, atol=1e-4)
    once = w.common_nbytes if isinstance(w, Format) else 0
    assert nbytes(joined) == nbytes(w) + nbytes(other) - once


def test_parameter_of_a_module(name):
    """Catches formats that lose their type in nnx.split, merge or a jitted step."""
    w, _ = built(name)

    class Holder(nnx.Module):
        def __init__(self):
            self.experts = nnx.Param(w)

    graphdef, state = nnx.split(Holder())

    @jax.jit
    def step(state):
        return nnx.split(nnx.merge(graphdef, state))[1]

    again = nnx.merge(graphdef, step(state)).experts.get_value()
    assert jax.tree.structure(again) == jax.tree.structure(w)
    np.testing.assert_array_equal(materialize(again), materialize(w))


def test_axes_name_every_leaf(name):
    """Catches leaves that a mesh could not place: missing names or one name too few."""
    w, _ = built(name)
    names = logical_axes(w, ("expert", "embed", "mlp"))
    assert {k: len(v) for k, v in names.items()} == {k: a.ndim for k, a in flatten(w).items()}
    shared = w.common if isinstance(w, Format) else ()
    assert all(axes[0] == (None if k in shared else "expert") for k, axes in names.items())
    with pytest.raises(SpecError):
        logical_axes(w, ("expert", "embed"))


def test_relative_error_of_itself_is_zero(name):
    """Catches an error measured against another layout."""
    w, exact = built(name)
    error = relative_error(jnp.float32(exact), w)
    assert error.shape == (E,)
    np.testing.assert_allclose(error, 0, atol=1e-5)
