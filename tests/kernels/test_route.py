"""One packed-key sort against stable argsorts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moejax_kernels.route import BACKENDS, route, sort_by_expert

E = 5


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_order_is_stable_and_inverse(backend, data):
    """Catches ties out of order, invalid assignments that are counted, a wrong inverse."""
    size = data.draw(st.sampled_from([1, 6, 17]))
    expert = data.draw(st.lists(st.integers(0, E - 1), min_size=size, max_size=size))
    valid = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    order = sort_by_expert(jnp.asarray(expert), E, valid_A=jnp.asarray(valid), backend=backend)
    wanted = sorted(range(size), key=lambda a: (expert[a] if valid[a] else E, a))
    np.testing.assert_array_equal(order.order_A, wanted)
    np.testing.assert_array_equal(order.place_A[order.order_A], np.arange(size))
    counts = [sum(v and e == i for e, v in zip(expert, valid, strict=True)) for i in range(E)]
    np.testing.assert_array_equal(order.group_sizes_E, counts)


def test_one_sort_of_one_operand():
    """Catches a second sort, or keys and positions sorted as a pair."""
    text = str(jax.make_jaxpr(lambda e: sort_by_expert(e, E))(jnp.zeros(64, jnp.int32)))
    line = next(line for line in text.splitlines() if "= sort[" in line)
    assert text.count("= sort[") == 1 and line.split("=")[0].count(":i32[64]") == 1


def test_more_keys_than_an_int32_holds():
    """Catches packed keys that overflow, where experts * assignments pass 2**31."""
    shape = jax.ShapeDtypeStruct((2**16,), jnp.int32)
    text = str(jax.make_jaxpr(lambda e: sort_by_expert(e, 2**15))(shape))
    line = next(line for line in text.splitlines() if "= sort[" in line)
    assert line.split("=")[0].count(":i32[65536]") == 2  # key and position, unpacked


@pytest.mark.parametrize("backend", BACKENDS)
def test_route_chooses_the_best_and_lower_of_equals(backend):
    """Catches a wrong tie rule, padding that is routed, and scores without a gradient."""
    scores = jnp.asarray([[0.1, 0.5, 0.5, 0.2], [0.9, 0.0, 0.3, 0.4], [0.3, 0.3, 0.3, 0.3]])
    valid = jnp.asarray([True, False, True])
    score, expert, order = route(scores, 2, valid_T=valid, backend=backend)
    np.testing.assert_array_equal(expert, [[1, 2], [0, 3], [0, 1]])
    np.testing.assert_allclose(score, np.take_along_axis(np.asarray(scores), expert, 1))
    np.testing.assert_array_equal(order.group_sizes_E, [1, 2, 1, 0])
    np.testing.assert_array_equal(order.order_A[:4], [4, 0, 5, 1])
    gradient = jax.grad(lambda s: route(s, 2, backend=backend)[0].sum())(scores)
    np.testing.assert_array_equal(gradient, [[0, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0]])


def test_under_jit_vmap_and_scan():
    """Catches an order that mixes the members of a batch."""
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7, E)), jnp.float32)
    batched = jax.jit(jax.vmap(lambda s: route(s, 2)))(scores)
    _, scanned = jax.lax.scan(lambda c, s: (c, route(s, 2)), None, scores)
    for got, same in zip(jax.tree.leaves(batched), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_array_equal(got, same)
    one = route(scores[1], 2, backend="reference")
    for got, wanted in zip(jax.tree.leaves(batched), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(got[1], wanted)


def test_wrong_calls_say_what_is_wrong():
    """Catches shapes that broadcast into a wrong order."""
    with pytest.raises(ValueError, match="integers"):
        sort_by_expert(jnp.zeros(3), E)
    with pytest.raises(ValueError, match="differ"):
        sort_by_expert(jnp.zeros(3, jnp.int32), E, valid_A=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="k = 6"):
        route(jnp.zeros((3, E)), 6)
    with pytest.raises(ValueError, match="unknown"):
        route(jnp.zeros((3, E)), 2, backend="fast")
