"""MoE-CSP (arXiv:2211.10017): packed products on ragged loads, and bytes of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.weights import SymmetricGrid, grouped_matmul, materialize
from tests.systems.running import run_system


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_products_are_those_of_decoded_experts(bits):
    """Catches rows of empty experts that read their neighbours, and scales of another channel."""
    generator = np.random.default_rng(bits)
    w = SymmetricGrid(bits=bits, group=None)(jnp.asarray(generator.normal(size=(5, 64, 48))))
    x = jnp.asarray(generator.normal(size=(40, 64)), jnp.float32)
    sizes = jnp.asarray([0, 17, 0, 1, 22], jnp.int32)
    found = jax.jit(grouped_matmul)(x, w, sizes)
    wanted = grouped_matmul(x, materialize(w), sizes)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_experts_shrink_and_the_model_holds(tmp_path):
    """Catches 4-bit codes in bytes, scales that are not counted, and other matrices touched."""
    sizes = ("Text.bytes_per_group=8192", "calibration/Text.skip_bytes=8192")
    ran = run_system("quantization/moe_csp", tmp_path, ("SavedModel.path='nano'", *sizes))
    base, four = ran.result.arm("reference"), ran.result.arm("experts at 4 bits")
    # Experts of 64 inputs: a scale of 16 bits for 64 codes of 4. From 240 inputs on it is 7.5.
    assert 2 * base.expert_bytes / four.expert_bytes == pytest.approx(32 / (4 + 16 / 64))
    assert four.stored_bytes - four.expert_bytes == base.stored_bytes - base.expert_bytes
    # By KL: the loss itself changes by less than its standard error here.
    assert 0 < ran.result.arm("experts at 8 bits").average.kl < four.average.kl
