"""Mixers on their own: built with random values everywhere, run at once and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.core import compat, taps

WIDTH = 12
LENGTH = 7


def built(spec, seed=0, width=WIDTH):
    """A module of which no vector is what it starts as: zeros and ones hide what they touch."""
    module = spec.build(width, 0.4, rngs=nnx.Rngs(seed))
    draws = np.random.default_rng(seed)
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            value = compat.read(variable)
            if value.ndim == 1:
                compat.write(variable, jnp.asarray(draws.uniform(0.5, 1.5, value.shape), "float32"))
    return module


def values(module):
    """name -> float64."""
    return {
        ".".join(map(str, path)): np.asarray(compat.read(node), np.float64)
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }


def inputs(seed=0, batch=2, length=LENGTH, width=WIDTH):
    return jax.random.normal(jax.random.key(seed), (batch, length, width))


@functools.partial(jax.jit, static_argnums=0)
def step(graphdef, leaves, x_BxSxD, state, position_BxS, mask_BxS, carry):
    module = nnx.merge(graphdef, leaves)
    request = frozenset({taps.ATTENTION_MASS})
    return module(x_BxSxD, state, position_BxS, mask_BxS, request, carry)


def at_once(module, x_BxSxD, mask_BxS=None, carry=None):
    """(y, state, taps, written) of a whole text without a state."""
    B, S, _ = x_BxSxD.shape
    mask_BxS = jnp.ones((B, S), bool) if mask_BxS is None else mask_BxS
    position_BxS = jnp.broadcast_to(jnp.arange(S), (B, S))
    return step(*nnx.split(module), x_BxSxD, None, position_BxS, mask_BxS, carry or {})


def by_steps(module, x_BxSxD, first=3, spare=2):
    """y of the same text: `first` tokens together into a state, the others one by one."""
    B, S, D = x_BxSxD.shape
    state = module.spec.init_state(D, B, S + spare, jnp.float32)
    found, at = [], 0
    while at < S:
        end = first if at == 0 else at + 1
        position = jnp.broadcast_to(jnp.arange(at, end), (B, end - at))
        mask = jnp.ones((B, end - at), bool)
        y, state, _, _ = step(*nnx.split(module), x_BxSxD[:, at:end], state, position, mask, {})
        found.append(y)
        at = end
    return jnp.concatenate(found, axis=1)


def rms(x, scale, epsilon=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rotated(x_SxHxW, base=100.0, width=None, interleaved=False, positions=None):
    """Complex rotation of the first `width` dimensions."""
    S, _, W = x_SxHxW.shape
    width = W if width is None else width
    at = np.arange(S) if positions is None else positions
    angle = at[:, None] * base ** (-2 * np.arange(width // 2) / width)
    head, rest = x_SxHxW[..., :width], x_SxHxW[..., width:]
    if interleaved:
        z = (head[..., 0::2] + 1j * head[..., 1::2]) * np.exp(1j * angle)[:, None]
        turned = np.stack([z.real, z.imag], -1).reshape(head.shape)
    else:
        half = width // 2
        z = (head[..., :half] + 1j * head[..., half:]) * np.exp(1j * angle)[:, None]
        turned = np.concatenate([z.real, z.imag], -1)
    return np.concatenate([turned, rest], -1)


def softmax_mix(q_SxHxW, k_SxGxW, v_SxGxV, scale, window=None, cap=None, sinks=None):
    """Attention head by head and token by token: [S, H V]."""
    S, H, _ = q_SxHxW.shape
    group, out = H // k_SxGxW.shape[1], []
    for s in range(S):
        first = 0 if window is None else max(0, s - window + 1)
        row = []
        for h in range(H):
            logits = k_SxGxW[first : s + 1, h // group] @ q_SxHxW[s, h] * scale
            logits = logits if cap is None else cap * np.tanh(logits / cap)
            e = np.exp(logits)
            total = e.sum() + (0 if sinks is None else np.exp(sinks[h]))
            row.append((e / total) @ v_SxGxV[first : s + 1, h // group])
        out.append(np.concatenate(row))
    return np.stack(out)
