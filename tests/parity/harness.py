"""Parity of imported families with transformers: tiny random models, saved by it, read by us.

A family's test data is a `Case`: its model_type and the config fields of a tiny model of odd sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import weights
from moejax.checkpoint import Imported, export_model, import_model
from moejax.core import taps
from moejax.models import (
    DecoderLM,
    ModelSpec,
    Output,
    forward,
    init_state,
    layers,
    parameters,
    select_experts,
    with_layers,
    with_parameters,
)
from moejax.models.decoder import layer as layer_of
from moejax.moe import ChosenSoftmaxGates, MoESpec, PNormGates, SoftmaxGates

BOUND = 1e-5  # of the largest |logit|, float32 on both sides
VISIBLE = 100  # times the bound that a planted fault moves logits by
LEAST_SHARE = 0.3  # of the residual's rms that each routed output has at least
BATCH, LENGTH, PREFIX = 2, 11, 4
CUTS = (0, PREFIX, *range(PREFIX + 1, LENGTH + 1))  # of a text that is decoded

TINY = dict(  # of most families: heads that no power of two is made of, K above 2 of odd E
    vocab_size=97,
    hidden_size=36,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """config: fields on top of `TINY`; None takes one of TINY's away. gain: of the matrices of
    experts over 1/sqrt(inputs), so that they are heard. adjust: changes the torch model after its
    weights are drawn, such as a bias that is no parameter."""

    model_type: str
    config: Mapping[str, Any]
    gain: float = 2.0
    adjust: Callable[[Any], None] = lambda model: None
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.model_type


@dataclasses.dataclass(frozen=True)
class Pair:
    """The model in both libraries: its folder, tokens, transformers' logits, and ours."""

    folder: Path
    tokens: np.ndarray
    expected: np.ndarray
    imported: Imported

    @property
    def model(self) -> DecoderLM:
        return self.imported.model


def require_transformers() -> None:
    """Skips where the optional libraries of the parity tests are not installed."""
    why = "parity tests need the extra: pip install 'moejax[parity]'"
    pytest.importorskip("torch", reason=why)
    pytest.importorskip("transformers", reason=why)


@functools.cache
def pair(case: Case, seed: int) -> Pair:
    """A random model of the case, and its import; made once per process."""
    import torch

    model = _random(case, seed)
    folder = Path(tempfile.mkdtemp(prefix=f"parity-{case}-")) / "model"
    model.save_pretrained(folder)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (BATCH, LENGTH))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    return Pair(folder, tokens, expected, import_model(folder, dtype=jnp.float32))


def _random(case: Case, seed: int) -> Any:
    """A torch model whose maps keep the scale of what they map, with no norm or bias at rest."""
    import torch
    import transformers

    fields = {key: value for key, value in TINY.items() if key not in case.config}
    fields |= {k: v for k, v in case.config.items() if v is not None or k not in TINY}
    config = transformers.AutoConfig.for_model(case.model_type, **fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=draw)
            if value.ndim == 1:
                at = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                value.copy_(at + 0.1 * noise)
            else:
                gain = case.gain if "experts" in name else 1.0
                value.copy_(gain * value.shape[-1] ** -0.5 * noise)
        model.get_input_embeddings().weight.copy_(
            torch.randn(model.get_input_embeddings().weight.shape, generator=draw)
        )
        case.adjust(model)
    return model


def error(found: Any, expected: np.ndarray) -> float:
    """Largest difference of logits, as a share of the largest logit."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def prefill(model: DecoderLM, tokens: np.ndarray) -> np.ndarray:
    """Logits of whole texts."""
    return np.asarray(_run(model, tokens).logits_BxSxV)


def decode(model: DecoderLM, tokens: np.ndarray) -> np.ndarray:
    """The same logits, a few tokens at once and then one by one with the cache."""
    graphdef, parameters_ = nnx.split(model)
    state = init_state(model, *tokens.shape)
    found = []
    for first, last in itertools.pairwise(CUTS):
        position = jnp.broadcast_to(jnp.arange(first, last), (tokens.shape[0], last - first))
        part = jnp.asarray(tokens[:, first:last])
        logits, state = _step(graphdef, parameters_, part, position, state)
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1)


def routed_shares(model: DecoderLM, tokens: np.ndarray) -> list[float]:
    """rms of each routed layer's output over the rms of the residual that it is added to."""
    found = _run(model, tokens).taps
    shares = []
    for layer in model.spec.moe_layers:
        after = np.asarray(found[layer][taps.BLOCK_OUTPUT]).reshape(tokens.size, -1)
        added = np.asarray(found[layer][taps.FFN_OUTPUT]).reshape(tokens.size, -1)
        if (norm := layer_of(model, layer).ffn_post_norm) is not None:
            added = np.asarray(norm(jnp.asarray(added)))
        added = model.spec.residual_multiplier * added
        shares.append(float(np.sqrt((added**2).mean() / ((after - added) ** 2).mean())))
    return shares


def with_experts_swapped(model: DecoderLM, tokens: np.ndarray) -> DecoderLM:
    """The model with the two busiest experts of its first routed layer in each other's place."""
    layer = model.spec.moe_layers[0]
    routing = _run(model, tokens).routings[layer]
    assert routing is not None
    a, b = np.argsort(-np.asarray(routing.counts_E()))[:2]
    order = np.arange(routing.experts)
    order[[a, b]] = order[[b, a]]
    named = parameters(model)
    for name in named:
        if name.startswith(f"layers.{layer}.moe.experts."):
            named[name] = weights.take(named[name], jnp.asarray(order))
    return with_parameters(model.spec, named)


def without_renormalisation(model: DecoderLM) -> DecoderLM | None:
    """The model whose chosen gates are not divided by their sum; None if they never are."""
    spec = _unnormalised(model.spec)
    return None if spec == model.spec else with_parameters(spec, parameters(model))


def exported_logits(case_pair: Pair, folder: Path, edited: DecoderLM | None = None) -> np.ndarray:
    """Logits of transformers, from the folder that we export the model to, or an edited one."""
    import torch
    import transformers

    imported = case_pair.imported
    model = imported.model if edited is None else edited
    export_model(folder, model, family=imported.family, config=imported.config)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    lost = {key: found for key, found in report.items() if found and key != "error_msgs"}
    assert not lost, lost
    with torch.no_grad():
        return loaded.eval()(torch.tensor(case_pair.tokens)).logits.numpy()


def pruned(model: DecoderLM) -> DecoderLM:
    """The model without its last layer, and without the first expert of every routed one."""
    blocks = layers(model)[:-1]
    return with_layers(
        model,
        [
            select_experts(block, list(range(1, block.spec.ffn.experts)))
            if isinstance(block.spec.ffn, MoESpec)
            else block
            for block in blocks
        ],
    )


def _unnormalised(spec: ModelSpec) -> ModelSpec:
    layers = []
    for layer in spec.layers:
        if isinstance(layer.ffn, MoESpec):
            router = dataclasses.replace(layer.ffn.router, gates=_raw_gates(layer.ffn.router.gates))
            layer = dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, router=router))
        layers.append(layer)
    return dataclasses.replace(spec, layers=tuple(layers))


def _raw_gates(gates: Any) -> Any:
    """The gates without their division by a sum or a norm of the chosen."""
    if isinstance(gates, PNormGates | ChosenSoftmaxGates):
        return SoftmaxGates(scale=getattr(gates, "scale", 1.0))
    renormalised = getattr(gates, "renormalise", False)
    return dataclasses.replace(gates, renormalise=False) if renormalised else gates


def _run(model: DecoderLM, tokens: np.ndarray) -> Output:
    """One pass over whole texts; models of one structure share the compiled program."""
    return _prefill(*nnx.split(model), jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _prefill(graphdef: Any, state: Any, tokens: jax.Array) -> Output:
    request = frozenset({taps.FFN_OUTPUT, taps.BLOCK_OUTPUT})
    return forward(nnx.merge(graphdef, state), tokens, request=request)


@functools.partial(jax.jit, static_argnums=0)
def _step(graphdef: Any, parameters_: Any, tokens: jax.Array, position: jax.Array, state: Any):
    model = nnx.merge(graphdef, parameters_)
    out = forward(model, tokens, positions_BxS=position, state=state)
    return out.logits_BxSxV, out.state
