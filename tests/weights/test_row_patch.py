"""What a table of rows costs, and which tables are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.weights import (
    AsymmetricGrid,
    Buckets,
    RowPatch,
    bits_per_weight,
    code_bits,
    concatenate,
    materialize,
    nbytes,
    patch_rows,
)

E, K, N, r = 3, 32, 6, 2
w_ExKxN = jnp.asarray(np.random.default_rng(0).standard_normal((E, K, N)), jnp.float32)
BASE = AsymmetricGrid(bits=2, group=16)(w_ExKxN)
index_Exr = jnp.asarray([[0, 31], [7, 3], [5, 6]])
ROWS = jnp.take_along_axis(w_ExKxN, index_Exr[..., None], 1)
PATCH = patch_rows(BASE, index_Exr, ROWS)


def test_a_row_costs_two_bytes_per_weight_and_two_for_its_number():
    """Catches rows kept in float32, an index of 4 bytes, and a table that counts as codes."""
    assert nbytes(PATCH) - nbytes(BASE) == E * r * (2 * N + 2)
    assert code_bits(PATCH) == 2
    assert bits_per_weight(PATCH) == 8 * nbytes(PATCH) / (E * K * N)
    wide = jnp.zeros((1, 2**16 + 1, 1), jnp.bfloat16)
    patch = patch_rows(wide, jnp.asarray([[2**16]]), jnp.ones((1, 1, 1)))
    assert patch.index.dtype == jnp.int32 and materialize(patch)[0, -1, 0] == 1
    patch = patch_rows(wide[:, 1:], jnp.asarray([[2**16 - 1]]), jnp.ones((1, 1, 1)))
    assert patch.index.dtype == jnp.uint16 and materialize(patch)[0, -1, 0] == 1


def test_rows_come_back_and_others_stay():
    """Catches rows added to the base instead of put in its place."""
    wanted = np.array(materialize(BASE))
    for e, channels in enumerate(np.asarray(index_Exr)):
        wanted[e, channels] = np.asarray(ROWS[e].astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(materialize(PATCH), wanted)


@pytest.mark.parametrize(
    "base, index, rows",
    [
        (Buckets((BASE,)), index_Exr, ROWS),
        (BASE, index_Exr[:2], ROWS[:2]),
        (BASE, index_Exr, ROWS[..., :3]),
        (BASE, index_Exr[:, :0], ROWS[:, :0]),
        (BASE, jnp.zeros((E, K + 1), int), jnp.zeros((E, K + 1, N))),
    ],
)
def test_tables_that_do_not_fit_are_refused(base, index, rows):
    """Catches a table of other experts, of other columns, or of more rows than there are."""
    with pytest.raises(SpecError, match="RowPatch"):
        patch_rows(base, index, rows)


def test_unfit_dtypes_and_unlike_tables_are_refused():
    """Catches rows that cost more than is said, and a join that pads."""
    with pytest.raises(SpecError, match="bfloat16"):
        RowPatch(BASE, PATCH.index, ROWS).check()
    with pytest.raises(SpecError, match="uint16 or int32"):
        RowPatch(BASE, PATCH.index.astype(jnp.uint8), PATCH.rows).check()
    with pytest.raises(SpecError, match=r"\[1, 2\] rows"):
        concatenate([PATCH, patch_rows(BASE, index_Exr[:, :1], ROWS[:, :1])])
