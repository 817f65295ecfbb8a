"""A tiny model whose experts 3, 4, 5 are copies of 0, 1, 2 with their hidden units shuffled."""

import functools

import jax.numpy as jnp
import numpy as np

from moejax.models import layers, permute_hidden, with_layers
from tests.compress.conftest import EXPERTS
from tests.evaluate.conftest import make_model

PAIRS = ((0, 3), (1, 4), (2, 5))


@functools.cache
def duplicated(seed=0, shuffled=True):
    """Equal functions in pairs; routers are as drawn, so that both of a pair are in use."""
    model, draw = make_model(seed), np.random.default_rng(seed)
    blocks = layers(model)
    for i, block in enumerate(blocks):
        block.moe.experts.take(jnp.asarray([0, 1, 2, 0, 1, 2]))
        width = block.spec.ffn.width
        order = np.tile(np.arange(width), (EXPERTS, 1))
        if shuffled:
            order[3:] = [draw.permutation(width) for _ in range(3)]
        blocks[i] = permute_hidden(block, order)
    return with_layers(model, blocks)
