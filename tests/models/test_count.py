"""Counts of released models, to the digits that are published or summed from their dimensions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import (
    AttentionSpec,
    DenseSpec,
    EarlierKV,
    LayerNorm,
    LayerSpec,
    LocalFilterSpec,
    MLASpec,
    ModelSpec,
    ProjectionNorm,
    RotatedHeadNorm,
    SharedKV,
    cache_bytes_per_token,
    count_parameters,
    flops_per_token,
)
from moejax.moe import MoESpec, RouterSpec, SoftmaxGates, TopK


def routed(experts, k, width, shared=0):
    router = RouterSpec(selector=TopK(k=k), gates=SoftmaxGates())
    return MoESpec(experts=experts, width=width, router=router, shared_width=shared)


def attention(heads, kv_heads, head_width, **more):
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_width=head_width, **more)


def mla(heads, q_rank):
    return MLASpec(
        heads=heads, nope_width=128, rope_width=64, value_width=128, kv_rank=512, q_rank=q_rank
    )


def model(vocab, width, layers, tied=False, **more):
    return ModelSpec(vocab=vocab, width=width, layers=layers, tie_embeddings=tied, **more)


def plain(vocab, width, layers, mixer, ffn, **more):
    return model(vocab, width, (LayerSpec(mixer=mixer, ffn=ffn),) * layers, **more)


def deepseek(vocab, width, mixer, dense, dense_width, layers, ffn):
    first = LayerSpec(mixer=mixer, ffn=DenseSpec(width=dense_width))
    rest = LayerSpec(mixer=mixer, ffn=ffn)
    return model(vocab, width, (first,) * dense + (rest,) * (layers - dense))


def hunyuan_large():
    gives = attention(80, 8, 80, qk_norm=RotatedHeadNorm(), kv=SharedKV())
    reads = dataclasses.replace(gives, kv=EarlierKV())
    ffn = routed(16, 1, 18304, shared=18304)
    pair = tuple(LayerSpec(mixer=mixer, ffn=ffn) for mixer in (gives, reads))
    return model(129024, 6400, pair * 32, tied=True)


def arctic():
    layer = LayerSpec(
        mixer=attention(56, 8, 128),
        ffn=routed(128, 2, 4864),
        dense_residual=DenseSpec(width=7168),
    )
    return model(32000, 7168, (layer,) * 35)


def openmoe_8b():
    mixer, dense = attention(24, 24, 128), DenseSpec(width=8192)
    usual = LayerSpec(mixer=mixer, ffn=dense)
    moe = (LayerSpec(mixer=mixer, ffn=routed(32, 2, 8192)), LayerSpec(mixer=None, ffn=dense))
    return model(256384, 2048, ((usual,) * 5 + moe) * 4, tied=True)


# Billions: total, active with both embedding matrices, with the output matrix, with none; and bytes
# that a token adds to a bfloat16 cache. Counts are summed tensor by tensor from released configs.
RELEASED = {
    "Mixtral 8x7B": (
        lambda: plain(32000, 4096, 32, attention(32, 8, 128), routed(8, 2, 14336)),
        (46.703, 12.880, 12.749, 12.618),
        32 * 2 * 8 * 128 * 2,
    ),
    "OLMoE-1B-7B": (
        lambda: plain(
            50304, 2048, 16, attention(16, 16, 128, qk_norm=ProjectionNorm()), routed(64, 8, 1024)
        ),
        (6.919, 1.282, 1.179, 1.076),
        16 * 2 * 2048 * 2,
    ),
    "DBRX": (
        lambda: plain(
            100352,
            6144,
            40,
            attention(48, 8, 128, clip=8.0),
            routed(16, 4, 10752),
            norm=LayerNorm(bias=False),
        ),
        (131.597, 36.470, 35.853, 35.237),
        40 * 2 * 8 * 128 * 2,
    ),
    "Phi-3.5-MoE": (
        lambda: plain(
            32064,
            4096,
            32,
            attention(32, 8, 128, qkv_bias=True, o_bias=True),
            routed(16, 2, 6400),
            norm=LayerNorm(),
            head_bias=True,
        ),
        (41.873, 6.641, 6.510, 6.378),
        32 * 2 * 8 * 128 * 2,
    ),
    "DeepSeekMoE 16B": (
        lambda: deepseek(
            102400, 2048, attention(16, 16, 128), 1, 10944, 28, routed(64, 6, 1408, shared=2816)
        ),
        (16.376, 2.829, 2.619, 2.409),
        28 * 2 * 2048 * 2,
    ),
    "DeepSeek-V2-Lite": (
        lambda: deepseek(
            102400, 2048, mla(16, None), 1, 10944, 27, routed(64, 6, 1408, shared=2816)
        ),
        (15.706, 2.661, 2.451, 2.242),
        27 * (512 + 64) * 2,
    ),
    "DeepSeek-V3": (
        lambda: deepseek(
            129280, 7168, mla(128, 1536), 3, 18432, 61, routed(256, 8, 2048, shared=2048)
        ),
        (671.026, 37.552, 36.626, 35.699),
        61 * (512 + 64) * 2,
    ),
    "Hunyuan-Large": (hunyuan_large, (388.701, 51.322, 50.496, 50.496), 32 * 2 * 8 * 80 * 2),
    "Grok-1": (
        lambda: plain(
            131072,
            6144,
            64,
            attention(48, 8, 128, soft_cap=30.0),
            routed(8, 2, 32768),
            tied=True,
            post_norm=True,
        ),
        (315.685, 83.757, 82.951, 82.951),
        64 * 2 * 8 * 128 * 2,
    ),
    "Arctic": (arctic, (478.585, 17.319, 17.089, 16.860), 35 * 2 * 8 * 128 * 2),
    "OpenMoE 8B": (openmoe_8b, (8.780, 2.740, 2.215, 2.215), 24 * 2 * 24 * 128 * 2),
    "Yuan2-M32, linear router": (
        lambda: plain(
            135040,
            2048,
            24,
            attention(16, 16, 256, filter=LocalFilterSpec()),
            routed(32, 2, 8192),
            tied=True,
        ),
        (39.940, 3.701, 3.424, 3.424),  # its attention router has two matrices [D, E] more a layer
        24 * 2 * 16 * 256 * 2,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_published_size(name):
    """Catches a matrix too many or too few anywhere: keys in layers that read others', a norm that
    is not there, biases, convolutions, a tied matrix counted twice, a cache of expanded heads."""
    build, billions, cached = RELEASED[name]
    spec = build()
    counts = count_parameters(spec)
    found = [round(value / 1e9, 3) for value in dataclasses.astuple(counts)]
    assert found == list(billions)
    assert cache_bytes_per_token(spec) == cached


def test_flops_follow_the_matrices_and_the_context():
    """Catches a window that does not bound the context, a tied head whose product is forgotten, and
    absorbed attention counted by the widths of expanded heads."""
    dense = DenseSpec(width=8)
    full, windowed = (
        plain(24, 16, 2, attention(2, 1, 8, window=window), dense) for window in (None, 10)
    )
    matrices = count_parameters(full).active_without_input_embedding
    assert flops_per_token(full, 100) == 2 * (matrices + 2 * 2 * 16 * 100)
    assert flops_per_token(windowed, 100) == 2 * (matrices + 2 * 2 * 16 * 10)
    tied = plain(24, 16, 2, attention(2, 1, 8), dense, tied=True)
    assert flops_per_token(tied, 100) == flops_per_token(full, 100)
    latent = plain(24, 16, 1, mla(2, None), dense)
    grows = flops_per_token(latent, 11) - flops_per_token(latent, 10)
    assert grows == 2 * 2 * (512 + 512 + 64)
    assert np.isclose(cache_bytes_per_token(latent, jnp.float32), 4 * 576)
