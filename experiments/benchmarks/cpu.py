"""A layer's experts on this machine's CPU, beside transformers', in turns in one process.

Every contender gets the same routes and random weights of the model's widths. A turn runs each
contender once; a ratio is the median over turns of the ratio within a turn, so that other load on
the machine meets both. Threads: all cores that the process may use, for both frameworks.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from moejax_kernels.grouped_matmul import FAST_COMPILE, grouped_matmul
from moejax_kernels.shapes import MIXTRAL, OLMOE, REFERENCE, ZIPF, Experts, Shape

Call = Callable[[], object]
_MODELS = {model.name: model for model in (OLMOE, MIXTRAL, REFERENCE)}
_SKEWS = {"balanced": 0.0, "skewed": ZIPF}
_GROUP = 128
_AT_LEAST = 0.05  # seconds that a timed call takes, repeats included
_LONG = 2.0  # seconds
_BANKS_OF_GRADIENT = 5  # ours, torch's, the gradient of one, and what its backward pass keeps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--models", nargs="+", choices=sorted(_MODELS), default=["olmoe", "mixtral"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 512, 4096])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--cut", type=int, default=1, help="divide widths, where memory is short")


def machine() -> str:
    """The processor, and how many cores this process may use."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores"


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per case, shape, kind of group sizes and ratio."""
    for name in options.models:
        model = _MODELS[name]
        if options.cut > 1:
            model = model._replace(
                name=f"{name}/{options.cut}",
                width=model.width // options.cut,
                expert_width=model.expert_width // options.cut,
            )
        bank = weights(model)
        for label, skew in _SKEWS.items():
            for tokens in options.tokens:
                shape = model.gate(tokens)
                yield from _float_rows(bank, shape, label, skew, options.turns)
                if tokens <= 32:
                    yield from _narrow_rows(bank, shape, label, skew, options.turns)
            yield from _product_rows(bank, model.gate(512), label, skew)
        yield from _linear_rows(bank, model, options.turns)


def weights(model: Experts) -> dict[str, Array]:
    """float32 gate, up [E, D, F] and down [E, F, D]; values repeat, which no matmul notices."""
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    wide = (model.experts, model.width, model.expert_width)
    narrow = (model.experts, model.expert_width, model.width)
    fill = {"gate": wide, "up": wide, "down": narrow}
    return {
        name: jnp.asarray(np.resize(noise, shape)) * shape[1] ** -0.5
        for name, shape in fill.items()
    }


def experts(product: Callable, x_TxD: Array, index_TxK: Array, gate_TxK: Array, bank) -> Array:
    """y_TxD: the chosen experts' gated FFNs, weighted.

    product: (x_RxK, name, bank, sizes_E) -> the grouped matmul with that part of the bank.
    """
    tokens, chosen = index_TxK.shape
    assignments, count = tokens * chosen, jax.tree.leaves(bank["gate"])[0].shape[0]
    # One sort of packed keys (expert, assignment) gives the order and keeps it stable.
    key_A = jnp.sort(index_TxK.ravel() * assignments + jnp.arange(assignments))
    order_A = key_A % assignments
    ends_E = jnp.searchsorted(key_A, (jnp.arange(count) + 1) * assignments)
    sizes_E = jnp.diff(ends_E, prepend=0).astype(jnp.int32)
    place_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(assignments))
    x_RxD = x_TxD[order_A // chosen]
    hidden = jax.nn.silu(product(x_RxD, "gate", bank, sizes_E))
    hidden = hidden * product(x_RxD, "up", bank, sizes_E)
    y_RxD = product(hidden, "down", bank, sizes_E)
    return (y_RxD[place_A].reshape(tokens, chosen, -1) * gate_TxK[..., None]).sum(1)


def dense(x: Array, name: str, bank, sizes: Array) -> Array:
    """Our grouped matmul on a plain bank."""
    return grouped_matmul(x, bank[name], sizes)


def dense_fast_compile(x: Array, name: str, bank, sizes: Array) -> Array:
    """The same with the loops that compile fastest."""
    return grouped_matmul(x, bank[name], sizes, backend=FAST_COMPILE)


def routes(shape: Shape, skew: float, dtype=jnp.float32) -> tuple[Array, Array, Array]:
    """x_TxD, index_TxK, gate_TxK."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((shape.tokens, shape.inputs)).astype(np.float32)
    gate = generator.random((shape.tokens, shape.chosen)).astype(np.float32)
    index = shape.choices(skew).astype(np.int32)
    return jnp.asarray(x, dtype), jnp.asarray(index), jnp.asarray(gate, dtype)


def _compiled(function: Callable, *arrays: Any) -> tuple[Call, float]:
    start = time.perf_counter()
    ready = jax.jit(function).lower(*arrays).compile()
    seconds = time.perf_counter() - start
    return lambda: jax.block_until_ready(ready(*arrays)), seconds


def take_turns(calls: dict[str, Call], turns: int) -> dict[str, np.ndarray]:
    """Seconds [turns] of each call.

    In each turn a call first runs untimed: the threads of the contender before it spin a while.
    Short calls are repeated; beside a call of seconds the spinning is nothing, so that from the
    second turn on it counts at once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            once = time.perf_counter() - start
            if turn and once > _LONG:
                seconds[name].append(once)
                continue
            repeats = max(1, int(_AT_LEAST / max(once, 1e-6)))
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: np.array(values) for name, values in seconds.items()}


def _rows(case, shape, label, times, compile_seconds, ratios) -> Iterator[dict[str, Any]]:
    for contender, over in ratios:
        if contender in times and over in times:
            yield {
                "case": case,
                "shape": shape if isinstance(shape, str) else shape.name.rpartition("/")[0],
                "sizes": label,
                "contender": contender,
                "milliseconds": 1e3 * float(np.median(times[contender])),
                "over": over,
                "ratio": float(np.median(times[contender] / times[over])),
                "compile_seconds": compile_seconds.get(contender),
            }


def _float_rows(bank, shape: Shape, label: str, skew: float, turns: int):
    x, index, gate = routes(shape, skew)
    calls, compiling = {}, {}
    run = partial(experts, dense)
    calls["ours"], compiling["ours"] = _compiled(run, x, index, gate, bank)
    calls |= torch_calls(bank, shape, (x, index, gate))
    theirs = [name for name in calls if name.startswith("transformers")]
    times = take_turns(calls, turns)
    ratios = [("ours", name) for name in theirs] or [("ours", "ours")]
    yield from _rows(f"forward {shape.tokens}", shape, label, times, compiling, ratios)
    if shape.tokens != 512:
        return
    wanted = _BANKS_OF_GRADIENT * sum(w.nbytes for w in bank.values())
    if wanted > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        print(
            f"gradient {shape.name}: takes {wanted / 1e9:.0f} GB, left out; --cut 2 has it smaller"
        )
        return
    del calls  # and with them a copy of the bank

    def loss(product, x, gate, bank):
        return experts(product, x, index, gate, bank).sum()

    calls = torch_calls(bank, shape, (x, index, gate), gradient=True)
    for name, product in (("ours", dense), ("ours fast compile", dense_fast_compile)):
        gradient = jax.grad(partial(loss, product), (0, 1, 2))
        calls[name], compiling[name] = _compiled(gradient, x, gate, bank)
    times = take_turns(calls, turns)
    ratios += [("ours fast compile", over) for _, over in ratios]
    yield from _rows(f"gradient {shape.tokens}", shape, label, times, compiling, ratios)


def _narrow_rows(bank, shape: Shape, label: str, skew: float, turns: int):
    """Decode in integers over our float32, and in bfloat16 over eager bfloat16."""
    x, index, gate = routes(shape, skew)
    calls, compiling = {}, {}
    calls["ours"], _ = _compiled(partial(experts, dense), x, index, gate, bank)
    if find_spec("moejax_kernels.quantized_grouped_matmul"):
        for bits in (8, 4, 3, 2):
            packed = {name: _packed(w, bits) for name, w in bank.items()}
            name = f"ours int{bits} g{_GROUP}"
            run = partial(experts, partial(_quantized, bits))
            calls[name], compiling[name] = _compiled(run, x, index, gate, packed)
        times = take_turns(calls, turns)
        ratios = [(name, "ours") for name in calls if name != "ours"]
        yield from _rows(f"forward {shape.tokens}", shape, label, times, compiling, ratios)
    half = {name: w.astype(jnp.bfloat16) for name, w in bank.items()}
    given = routes(shape, skew, jnp.bfloat16)
    calls = torch_calls(half, shape, given)
    calls["ours"], compiling["ours"] = _compiled(partial(experts, dense), *given, half)
    times = take_turns(calls, turns)
    ratios = [("ours", name) for name in calls if name != "ours"]
    yield from _rows(f"bfloat16 {shape.tokens}", shape, label, times, compiling, ratios)


def _packed(w_ExKxN: Array, bits: int) -> tuple[Array, Array]:
    """Words and scales of the right shapes; what they say does not change the time."""
    count, inputs, outputs = w_ExKxN.shape
    group = _GROUP if inputs % _GROUP == 0 else inputs
    words = jnp.full((count, inputs * bits // 32, outputs), 0x5A5A5A5A, jnp.uint32)
    return words, jnp.ones((count, inputs // group, outputs), jnp.float32)


def _quantized(bits: int, x: Array, name: str, bank, sizes: Array) -> Array:
    quantized = import_module("moejax_kernels.quantized_grouped_matmul")
    words, scale = bank[name]
    return quantized.quantized_grouped_matmul(x, words, scale, None, sizes, bits=bits)


def _product_rows(bank, shape: Shape, label: str, skew: float):
    """One product over ragged_dot, which is masked dense on CPUs: one turn of it is enough."""
    x = jnp.repeat(routes(shape, skew)[0], shape.chosen, axis=0)
    arrays = (x, bank["gate"], jnp.asarray(shape.group_sizes(skew)))
    calls, compiling = {}, {}
    calls["ours"], compiling["ours"] = _compiled(grouped_matmul, *arrays)
    calls["ragged_dot"], _ = _compiled(jax.lax.ragged_dot, *arrays)
    times = take_turns(calls, 1)
    yield from _rows("product 512", shape, label, times, compiling, [("ours", "ragged_dot")])


def _linear_rows(bank, model: Experts, turns: int):
    """Time per token at 16 times the tokens; time at 4 times the experts, as many rows."""
    few, many = model.gate(256), model.gate(4096)
    calls = {}
    for name, shape in (("tokens", few), ("tokens x16", many)):
        calls[name], _ = _compiled(partial(experts, dense), *routes(shape, 0.0), bank)
    times = take_turns(calls, turns)
    times["tokens x16"] = times["tokens x16"] / 16
    ratios = [("tokens x16", "tokens")]
    yield from _rows("linear", few, "balanced", times, {}, ratios)
    if model.experts // 4 >= model.chosen:
        part = {name: w[: model.experts // 4] for name, w in bank.items()}
        fewer = model._replace(experts=model.experts // 4).gate(4096)
        calls = {"experts x4": calls["tokens x16"]}
        calls["experts"], _ = _compiled(partial(experts, dense), *routes(fewer, 0.0), part)
        times = take_turns(calls, turns)
        yield from _rows("linear", many, "balanced", times, {}, [("experts x4", "experts")])


def torch_calls(bank, shape: Shape, given, *, gradient: bool = False) -> dict[str, Call]:
    """transformers' experts in each of its implementations; none where it is not installed."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        return {}
    import torch
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeExperts

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = OlmoeConfig(
        hidden_size=shape.inputs,
        intermediate_size=shape.outputs,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
    )
    with torch.device("meta"):
        module = OlmoeExperts(config)
    module.gate_up_proj = _parameter(bank["gate"], bank["up"])
    module.down_proj = _parameter(bank["down"])
    x, index, gate = (torch.from_dlpack(array).clone() for array in given)
    index = index.long()

    def call(implementation: str) -> None:
        config._experts_implementation = implementation
        if not gradient:
            with torch.no_grad():
                module(x, index, gate)
            return
        module.zero_grad(set_to_none=True)
        leaf, factor = x.detach().requires_grad_(), gate.detach().requires_grad_()
        module(leaf, index, factor).sum().backward()
        module.zero_grad(set_to_none=True)  # a second bank would not fit beside Mixtral's

    return {f"transformers {name}": partial(call, name) for name in ("eager", "grouped_mm")}


def _parameter(*parts: Array):
    """[E, outputs of all parts, K] of parts [E, K, N], without a copy beside it."""
    import torch

    tensors = [torch.from_dlpack(part).mT for part in parts]
    experts, _, inputs = tensors[0].shape
    outputs = [tensor.shape[1] for tensor in tensors]
    whole = torch.empty((experts, sum(outputs), inputs), dtype=tensors[0].dtype)
    for rows, tensor in zip(whole.split(outputs, dim=1), tensors, strict=True):
        rows.copy_(tensor)
    return torch.nn.Parameter(whole)
