"""llama models out of GGUF: equal to a reference on the file's own layout; what does not fit."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoint import load_gguf
from moejax.core import CheckpointError
from moejax.models import forward, parameters, with_parameters
from tests.checkpoint import gguf_llama as llama
from tests.files import gguf_writer as w

TOKENS = np.arange(12) * 7 % llama.V


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tied model's file."""
    path = tmp_path_factory.mktemp("gguf") / "tied.gguf"
    w.write_gguf(path, llama.metadata(), llama.tensors(tied=True)[0])
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_file(tmp_path, tied):
    """Catches rows of q and k left in pairs, matrices not transposed, k and v heads repeated in
    another order, a lost rope base, and an output matrix taken for tied."""
    stored, values = llama.tensors(tied)
    w.write_gguf(tmp_path / "a.gguf", llama.metadata(), stored)
    model = load_gguf(tmp_path / "a.gguf")
    expected = llama.reference_logits(values, TOKENS)
    assert _error(model, expected) < 1e-5
    assert model.spec.tie_embeddings == tied
    named = parameters(model)
    paired = dict(named)
    q = np.asarray(named["layers.0.attention.q"]).reshape(llama.D, llama.HEADS, 2, llama.W // 2)
    paired["layers.0.attention.q"] = q.swapaxes(2, 3).reshape(llama.D, -1)
    assert _error(with_parameters(model.spec, paired), expected) > 1e-3


def test_weights_may_be_cast_on_the_way(path):
    """Catches a dtype that is ignored."""
    named = parameters(load_gguf(path, dtype="bfloat16"))
    assert {str(value.dtype) for value in named.values()} == {"bfloat16"}


REFUSED = {
    "general.architecture = 'gemma'": {"architecture": (w.STRING, "gemma")},
    "general.architecture is missing": {"architecture": None},
    "llama.expert_count = 8": {"llama.expert_count": (w.U32, 8)},
    "llama.rope.scaling.type = 'yarn'": {"llama.rope.scaling.type": (w.STRING, "yarn")},
    "llama.rope.scaling.factor = 4.0": {"llama.rope.scaling.factor": (w.F32, 4.0)},
    "llama.rope.scale_linear = 4.0": {"llama.rope.scale_linear": (w.F32, 4.0)},
    "llama.block_count = 4000000000": {"block_count": (w.U32, 4_000_000_000)},
    "llama.rope.dimension_count = 8": {"dimension_count": (w.U32, 8)},
    "head_count_kv is .* expected a value of type int": {"head_count_kv": (w.STRING, "3")},
    "num_attention_heads = 0|heads = 0": {"head_count": (w.U32, 0)},
    "blk.0.ffn_down.weight has shape": {"feed_forward_length": (w.U32, 128)},
    "token_embd.weight has shape": {"embedding_length": (w.U32, 32)},
    "lack blk.2": {"block_count": (w.U32, 3)},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_models_of_another_kind_are_refused(tmp_path, problem):
    """Catches a model that loads and computes something else, and a field believed blindly."""
    stored, _ = llama.tensors(tied=True)
    w.write_gguf(tmp_path / "a.gguf", llama.metadata(**REFUSED[problem]), stored)
    with pytest.raises(CheckpointError, match=problem) as error:
        load_gguf(tmp_path / "a.gguf")
    assert "a.gguf" in error.value.problem and error.value.fix


def test_every_tensor_must_have_its_place(tmp_path):
    """Catches biases and rope factors that are dropped, NaN, and a type found out halfway."""
    stored, _ = llama.tensors(tied=True)
    bias = {"blk.0.attn_q.bias": w.stored("F32", np.zeros(8))}
    nan = {"output_norm.weight": w.stored("F32", np.full(llama.D, np.nan))}
    other = {"token_embd.weight": ("Q6_K", (llama.V, llama.D), bytes(210))}
    for change, problem in (
        (bias, "belong to no parameter.*attn_q.bias"),
        (nan, "output_norm.weight holds 64 value"),
        (other, "has type Q6_K"),
    ):
        w.write_gguf(tmp_path / "a.gguf", llama.metadata(), stored | change)
        with pytest.raises(CheckpointError, match=problem):
            load_gguf(tmp_path / "a.gguf")


@given(
    where=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.none() | st.integers(0, 10_000)
)
@settings(max_examples=40, deadline=None)
def test_changed_headers_give_named_errors_only(tmp_path_factory, path, where, value, cut):
    """Catches a damaged width that reaches a shape, an allocation or a hang."""
    whole = bytearray(path.read_bytes())
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    whole[24 + where % (header - 24)] = value
    damaged = tmp_path_factory.getbasetemp() / "changed.gguf"
    damaged.write_bytes(whole if cut is None else whole[: cut % len(whole)])
    try:
        load_gguf(damaged)
    except CheckpointError as error:
        assert str(damaged) in error.problem and error.fix


def _error(model, expected) -> float:
    graphdef, state = nnx.split(model)
    tokens = TOKENS[None].astype(np.int32)
    with jax.default_matmul_precision("float32"):
        found = jax.jit(lambda s: forward(nnx.merge(graphdef, s), tokens).logits_BxSxV)(state)
    return float(np.abs(np.asarray(found)[0] - expected).max() / np.abs(expected).max())
