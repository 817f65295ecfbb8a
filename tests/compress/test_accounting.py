"""Bytes and bits against the files that are written."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import load_model, payload_bytes, save_model, stored_bytes
from moejax.compress import ExpertDrop, Frequency, Quantize, account, payload, touched
from moejax.models import abstract_model, parameters
from moejax.weights import AsymmetricGrid, Log2Grid, SymmetricGrid
from tests.compress.conftest import assert_same_weights

THREE_BITS = Quantize(grid=SymmetricGrid(bits=3, group=32))
RECIPES = [
    (),
    (
        ExpertDrop(fraction=(0.0, 0.5), score=Frequency()),
        Quantize(grid=AsymmetricGrid(bits=2, group=16)),
        Quantize(
            grid=Log2Grid(bits=4, group=None, candidates=1), parameters="layers.0.attention.q"
        ),
    ),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_payload_is_what_is_written(applied, recipe, tmp_path):
    """Catches scales left out, float32 counted for bfloat16, and a model that loads as another."""
    after, _ = applied(*recipe)
    for dtype in (jnp.bfloat16, None):
        sizes = payload(after, dtype)
        save_model(tmp_path / str(dtype), after, dtype=dtype)
        assert sum(sizes.values()) == payload_bytes(after, dtype)
        assert sum(sizes.values()) == stored_bytes(tmp_path / str(dtype))
        assert account(after, dtype=dtype).stored_bytes == sum(sizes.values())
    loaded = load_model(tmp_path / "None")
    assert loaded.spec == after.spec
    assert_same_weights(loaded, after)


def test_bits_are_those_of_codes_and_of_all(model, applied):
    """Catches packed 3-bit codes in 4 bits, and bits per weight without scales."""
    after, ledger = applied(THREE_BITS)
    found = account(after, touched(ledger, "arm"))
    assert found.code_bits == 3
    assert found.bits_per_weight == 3 + 16 / 32
    sizes = payload(after)
    assert found.expert_bytes == sum(n for name, n in sizes.items() if ".experts." in name)
    assert found.expert_bytes == 2 * 3 * 6 * 32 * 32 * 3.5 / 8
    assert found.parameters == account(model).parameters
    assert account(model).code_bits == account(model).bits_per_weight == 16
    assert account(model, dtype=jnp.float32).code_bits == 32


def test_mean_bits_weigh_matrices_by_their_size(applied):
    """Catches the mean over names."""
    query = Quantize(grid=SymmetricGrid(bits=8, group=None), parameters="*.attention.q")
    after, ledger = applied(THREE_BITS, query)
    experts, attention = 3 * 6 * 32 * 32, 32 * 32
    wanted = (3 * experts + 8 * attention) / (experts + attention)
    assert account(after, touched(ledger, "arm")).code_bits == pytest.approx(wanted)


def test_an_abstract_model_has_the_same_account(model):
    """Catches an account that needs arrays, where a plan has shapes alone."""
    assert account(abstract_model(model.spec)) == account(model)
    total = sum(np.asarray(w).size for w in parameters(model).values())
    assert account(model).parameters == total
