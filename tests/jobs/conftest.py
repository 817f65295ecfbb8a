"""A small saved model, its dense twin, and a run folder to work in."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from moejax.checkpoint import save_model
from moejax.models import AttentionSpec, DecoderLM, DenseSpec, LayerSpec, ModelSpec
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK
from moejax.runs import RunFolder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Paths of a MoE and of its dense twin, vocabulary 4096, saved in bfloat16."""
    router = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates(renormalise=True))
    mixer = AttentionSpec(heads=1, kv_heads=1, head_width=32)
    layer = LayerSpec(mixer=mixer, ffn=MoESpec(experts=4, width=32, router=router))
    spec = ModelSpec(vocab=4096, width=32, layers=(layer, layer), init_scale=0.2)
    dense = dataclasses.replace(layer, ffn=DenseSpec(width=64))
    root = tmp_path_factory.mktemp("models")
    for name, layers in {"moe": (layer, layer), "dense": (dense, dense)}.items():
        model = DecoderLM(dataclasses.replace(spec, layers=layers), rngs=nnx.Rngs(0))
        save_model(root / name, model, dtype=jnp.bfloat16)
    return {name: str(root / name) for name in ("moe", "dense")}


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", "Study", "run.job = @Study()\n", ["moejax"])
