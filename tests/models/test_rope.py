"""Rotary positions against complex numbers, and their scalings against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import SpecError
from moejax.models import LinearScaling, Llama3Scaling, LongRope, Rope, YaRN, yarn_mscale
from tests.models.mixing import rotated

PLAIN = {
    "halves": Rope(base=100.0),
    "pairs": Rope(base=100.0, interleaved=True),
    "part of the head": Rope(base=100.0, width=6),
    "pairs in a part": Rope(base=100.0, width=6, interleaved=True),
}


def turned(rope, x_BxSxHxW, position_BxS, mask_BxS=None):
    mask_BxS = jnp.ones(position_BxS.shape, bool) if mask_BxS is None else mask_BxS
    return rope.rotation(x_BxSxHxW.shape[-1], position_BxS, mask_BxS)(x_BxSxHxW)


@pytest.mark.parametrize("name", PLAIN)
def test_rotation_is_a_complex_product(name):
    """Catches the other layout, frequencies of the whole head where a part is rotated, and
    positions counted from the start of the row."""
    rope = PLAIN[name]
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    y = turned(rope, x, positions)
    for row in range(2):
        expected = rotated(
            np.asarray(x[row], np.float64), 100.0, rope.width, rope.interleaved, positions[row]
        )
        np.testing.assert_allclose(y[row], expected, atol=2e-6)


def longrope(original, **more):
    short = tuple(1.0 + 0.1 * i for i in range(8))
    long = tuple(2.0 + 0.5 * i for i in range(8))
    return LongRope(short=short, long=long, original_length=original, **more)


def test_long_texts_take_the_long_divisors_each_for_itself():
    """Catches short divisors for every text, a choice by the longest text of the batch, and one
    that padding decides."""
    rope = Rope(base=100.0, scaling=longrope(6, short_scale=1.1, long_scale=1.3))
    x = jax.random.normal(jax.random.key(0), (3, 7, 2, 16))
    positions = jnp.broadcast_to(jnp.arange(7), (3, 7))
    mask = jnp.arange(7) < jnp.array([[7], [6], [6]])
    y = turned(rope, x, positions, mask)
    for row, (divisors, scale) in enumerate(
        [(rope.scaling.long, 1.3), (rope.scaling.short, 1.1), (rope.scaling.short, 1.1)]
    ):
        angle = np.arange(7)[:, None] * 100.0 ** (-np.arange(8) / 8) / np.array(divisors)
        z = np.asarray(x[row, ..., :8] + 1j * x[row, ..., 8:]) * np.exp(1j * angle)[:, None]
        expected = scale * np.concatenate([z.real, z.imag], -1)
        np.testing.assert_allclose(y[row], expected, atol=2e-6)


SCALED = {
    "linear": (LinearScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama 3": (
        Llama3Scaling(factor=8.0, low_factor=1.0, high_factor=4.0, original_length=8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        YaRN(factor=4.0, original_length=4096),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    "yarn of gpt-oss": (
        YaRN(factor=32.0, original_length=4096, whole=False),
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "yarn of deepseek": (
        YaRN(
            factor=40.0,
            original_length=4096,
            scale=yarn_mscale(40.0, 0.707) / yarn_mscale(40.0, 1.0),
        ),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    ),
}


def transformers_frequencies(fields, seq_len=None):
    pytest.importorskip("torch", reason="parity wants torch and transformers: extra 'parity'")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 10_000.0, **fields},
    )
    made, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, "cpu", seq_len)
    return made.numpy(), factor


@pytest.mark.parity
@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_are_those_of_transformers(name):
    """Catches a ramp over dimensions instead of pairs, ends of it rounded the other way, blended
    pairs of Llama 3 that jump, and an attention factor left out or taken twice."""
    scaling, fields = SCALED[name]
    plain = 10_000.0 ** (-jnp.arange(32, dtype=jnp.float32) / 32)
    length = jnp.array([5])
    expected, factor = transformers_frequencies(fields)
    got = np.asarray(scaling.frequencies(plain, 10_000.0, length))
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    np.testing.assert_allclose(scaling.attention_factor(length), factor, rtol=1e-6)
    assert np.abs(got / np.asarray(plain) - 1).max() > 0.5  # the scaling does something


@pytest.mark.parity
@pytest.mark.parametrize("length", [64, 65])
def test_longrope_is_that_of_transformers(length):
    """Catches the long divisors from the original length on instead of beyond it."""
    short = tuple(float(v) for v in np.linspace(1.0, 1.5, 32))
    long = tuple(float(v) for v in np.linspace(1.2, 40.0, 32))
    fields = {
        "rope_type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
        "factor": 32.0,
        "original_max_position_embeddings": 64,
    }
    expected, factor = transformers_frequencies(fields, length)
    scaling = LongRope(
        short=short, long=long, original_length=64, short_scale=factor, long_scale=factor
    )
    plain = 10_000.0 ** (-jnp.arange(32, dtype=jnp.float32) / 32)
    got = scaling.frequencies(plain, 10_000.0, jnp.array([length]))[0, 0, 0]
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Rope(width=3),
        lambda: Rope(base=0.0),
        lambda: YaRN(factor=0.5, original_length=8),
        lambda: YaRN(factor=2.0, original_length=8, fast=1.0, slow=2.0),
        lambda: LongRope(short=(1.0, 1.0), long=(1.0,), original_length=8),
        lambda: Llama3Scaling(factor=8.0, low_factor=4.0, high_factor=4.0, original_length=8),
    ],
)
def test_impossible_positions_are_refused(build):
    """Catches settings that give NaN or a rotation of half a pair."""
    with pytest.raises(SpecError):
        build()
