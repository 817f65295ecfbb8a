"""Generation against repeated full forward passes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import weights
from moejax.core import SpecError
from moejax.models import Greedy, Sample, generate, init_state, parameters, with_parameters
from moejax.models.generate import decode


def repeated(run, model, tokens_BxS, steps):
    """Greedy tokens by full passes over a text of final length; causality hides the padding."""
    S = tokens_BxS.shape[1]
    text = jnp.pad(tokens_BxS, ((0, 0), (0, steps)))
    for at in range(S, S + steps):
        text = text.at[:, at].set(run(model, text).logits_BxSxV[:, at - 1].argmax(-1))
    return text[:, S:]


def test_greedy_equals_repeated_forward(run, model, tokens_BxS):
    """Catches a cache that is written at the wrong place or a position that is off by one."""
    np.testing.assert_array_equal(
        generate(model, tokens_BxS, 4), repeated(run, model, tokens_BxS, 4)
    )


def test_left_padding_changes_nothing(model, tokens_BxS):
    """Catches padded prompts that shift positions or are attended to."""
    padded = jnp.concatenate([jnp.full((2, 3), 11), tokens_BxS], axis=1)
    mask = jnp.arange(12) >= 3
    got = generate(model, padded, 4, mask_BxS=jnp.broadcast_to(mask, padded.shape))
    np.testing.assert_array_equal(got, generate(model, tokens_BxS, 4))


def test_decode_writes_new_rows_alone(model):
    """Catches a cache that goes through the scan of the layers as its input and its output: XLA
    then holds it twice and copies it whole, twice per token."""
    state = init_state(model, 2, 37)
    graphdef, leaves = nnx.split(model)
    arguments = (leaves, jnp.zeros((2, 48)), jnp.zeros(2, jnp.int32), state, jax.random.key(0))
    lowered = decode.lower(graphdef, Greedy(), 4, jnp.float32, None, *arguments)
    text = str(lowered.compile().as_text())
    made = re.findall(r"= f32\[2,2,37,2,8\]\S* ([\w-]+)\(", text)
    assert "dynamic-update-slice" in made
    assert not {"copy", "copy-start", "broadcast", "concatenate"} & set(made), made


FORMATS = {
    "packed 3": lambda w: weights.SymmetricGrid(bits=3, group=32)(w),
    "asymmetric 4": lambda w: weights.AsymmetricGrid(bits=4, group=None)(w),
    "log2": lambda w: weights.Log2Grid(bits=4, group=32)(w),
    "low rank": lambda w: weights.truncated_svd(w, 4),
    "sum": lambda w: weights.Sum((weights.SymmetricGrid(bits=2, group=32)(w), w * 0.5)),
    "compensated": lambda w: (
        weights.compensated(
            w,
            weights.HQQGrid(bits=3, group=None),
            4,
            factors=weights.AsymmetricGrid(bits=3, group=None),
            iterations=0,
        ).weight
    ),
    "dictionary": lambda w: weights.encode(weights.TernaryRows()(w)),
    "buckets": lambda w: weights.Buckets(
        (
            weights.SymmetricGrid(bits=2, group=32)(w[:1]),
            weights.SymmetricGrid(bits=4, group=32)(w[1:]),
        )
    ),
}


SLOWER = {
    "asymmetric 4",
    "log2",
    "low rank",
    "dictionary",
}  # what they share with the others is tested there


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOWER else n for n in FORMATS]
)
def test_every_format_runs_in_prefill_and_decode(run, name, spec, model, tokens_BxS):
    """Catches a format whose grouped matmul differs from its materialised weight inside a model."""
    named = parameters(model)
    banks = [n for n in named if ".moe.experts." in n]
    formatted = with_parameters(spec, {**named, **{n: FORMATS[name](named[n]) for n in banks}})
    plain = with_parameters(
        spec, {n: weights.materialize(w) for n, w in parameters(formatted).items()}
    )
    np.testing.assert_allclose(
        run(formatted, tokens_BxS).logits_BxSxV,
        run(plain, tokens_BxS).logits_BxSxV,
        atol=1e-4,
        rtol=1e-4,
    )
    np.testing.assert_array_equal(
        generate(formatted, tokens_BxS, 2), generate(plain, tokens_BxS, 2)
    )


def test_samplers_follow_their_distribution():
    """Catches a top-p that drops the token which crosses the mass, and a top-k off by one."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits, (4000, 4))
    draw = lambda sampler: np.bincount(sampler(many, jax.random.key(0)), minlength=4) / 4000
    np.testing.assert_allclose(draw(Sample()), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(draw(Sample(top_k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw(Sample(top_p=0.6)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw(Sample(top_p=0.4)), [1, 0, 0, 0], atol=0)
    sharper = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(draw(Sample(temperature=0.5)), sharper / sharper.sum(), atol=0.03)
    assert draw(Greedy())[0] == 1
    with pytest.raises(SpecError, match="temperature"):
        Sample(temperature=0.0)
