"""Whole MoE layers against the blocks of transformers, with random weights and odd sizes.

Each family is one combination of specs; its output must equal the block's to 1e-5 of the largest
entry, and swapping two experts must move it by a hundred times that.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.core.taps import NOTHING
from moejax.moe import (
    BiasedTopK,
    ChosenSoftmaxGates,
    ClampedSwiGLU,
    GroupLimited,
    LinearScores,
    MoELayer,
    MoESpec,
    PNormGates,
    RouterContext,
    RouterSpec,
    SigmoidGates,
    SigmoidSharedGate,
    SoftmaxGates,
    SparseMixerGates,
    TopK,
)

pytestmark = [pytest.mark.parity, pytest.mark.slow]
torch = pytest.importorskip("torch", reason="torch is not installed: no parity with transformers")
pytest.importorskip("transformers", reason="transformers is not installed: no parity with it")

T, D, F, E, K = 40, 10, 7, 6, 3
TOLERANCE = 1e-5


def built(module_name, config_name, block, sizes):
    """(block of transformers with random weights, its tensors as float64 arrays)."""
    package = importlib.import_module(f"transformers.models.{module_name}.modeling_{module_name}")
    config = getattr(importlib.import_module("transformers"), config_name)(**sizes)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    made = getattr(package, block)(config).eval()
    for tensor in made.state_dict().values():
        tensor.normal_(0, 0.6)
    return made, {name: t.double().numpy() for name, t in made.state_dict().items()}


def released(made, x_TxD):
    with torch.no_grad():
        y = made(torch.from_numpy(x_TxD)[None])
    y = y[0] if isinstance(y, tuple) else y
    return y.reshape(-1, D).numpy()


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, x_TxD):
    return nnx.merge(graphdef, state)(x_TxD, RouterContext(), NOTHING)[0]


def output(spec, named, x_TxD):
    """y_TxD of a layer that holds `named`, which must be all of its parameters."""
    module = MoELayer(spec, D, 0.1, rngs=nnx.Rngs(0))
    variables = {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable)
    }
    assert variables.keys() == named.keys()
    for name, variable in variables.items():
        assert variable.get_value().shape == named[name].shape, name
        variable.set_value(jnp.asarray(named[name], jnp.float32))
    return np.asarray(_run(*nnx.split(module), x_TxD))


def swap(name, value):
    """Two experts exchanged, their columns in the router not."""
    return value[[1, 0, *range(2, E)]] if name.startswith("experts.") else value


def compare(spec, named, made):
    x_TxD = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    expected = released(made, x_TxD)
    bound = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(output(spec, named, x_TxD), expected, rtol=0, atol=bound)
    swapped = {name: swap(name, value) for name, value in named.items()}
    assert np.abs(output(spec, swapped, x_TxD) - expected).max() > 100 * bound
    return x_TxD, expected, bound


def fused(tensors, router="gate.weight"):
    """Router and experts of the usual layout: gate rows, then up rows, all transposed."""
    gate_up = tensors["experts.gate_up_proj"].swapaxes(1, 2)
    return {
        "router.scores.kernel": tensors[router].T,
        "experts.gate": gate_up[..., :F],
        "experts.up": gate_up[..., F:],
        "experts.down": tensors["experts.down_proj"].swapaxes(1, 2),
    }


def shared(tensors, prefix):
    return {f"shared.{m}": tensors[f"{prefix}.{m}_proj.weight"].T for m in ("gate", "up", "down")}


def softmax_router(**gates):
    return RouterSpec(selector=TopK(k=K), gates=SoftmaxGates(**gates))


@pytest.mark.parametrize("renormalise", [False, True])
def test_qwen2_moe(renormalise):
    """Catches a shared expert without its sigmoid gate, and renormalising where the flag is off."""
    made, tensors = built(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeSparseMoeBlock",
        {
            "hidden_size": D,
            "moe_intermediate_size": F,
            "shared_expert_intermediate_size": 9,
            "num_experts": E,
            "num_experts_per_tok": K,
            "norm_topk_prob": renormalise,
        },
    )
    named = fused(tensors) | shared(tensors, "shared_expert")
    named |= {"shared_gate": tensors["shared_expert_gate.weight"].T}
    spec = MoESpec(
        experts=E,
        width=F,
        router=softmax_router(renormalise=renormalise),
        shared_width=9,
        shared_gate=SigmoidSharedGate(),
    )
    compare(spec, named, made)


DEEPSEEK = {
    "num_attention_heads": 2,
    "hidden_size": D,
    "moe_intermediate_size": F,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "n_group": 3,
    "topk_group": 2,
}


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method):
    """Catches groups scored by their sum, experts outside the groups, and a lost scaling factor."""
    sizes = DEEPSEEK | {"topk_method": method}
    made, tensors = built("deepseek_v2", "DeepseekV2Config", "DeepseekV2Moe", sizes)
    top = TopK(k=K)
    limited = GroupLimited(selector=top, groups=3, kept=2)
    router = RouterSpec(
        selector=top if method == "greedy" else limited, gates=SoftmaxGates(scale=2.5)
    )
    spec = MoESpec(experts=E, width=F, router=router, shared_width=2 * F)
    compare(spec, fused(tensors) | shared(tensors, "shared_experts"), made)


@pytest.mark.parametrize(
    ("family", "prefix", "block"),
    [("deepseek_v3", "DeepseekV3", "DeepseekV3MoE"), ("glm4_moe", "Glm4Moe", "Glm4MoeMoE")],
)
@pytest.mark.parametrize("renormalise", [False, True])
def test_biased_groups(family, prefix, block, renormalise):
    """Catches a bias in the gate weights, groups ranked without it, and masking with zero."""
    sizes = DEEPSEEK | {"norm_topk_prob": renormalise}
    made, tensors = built(family, f"{prefix}Config", block, sizes)
    selector = GroupLimited(selector=BiasedTopK(k=K), groups=3, kept=2, best=2)
    gates = SigmoidGates(renormalise=renormalise, scale=2.5)
    spec = MoESpec(
        experts=E,
        width=F,
        router=RouterSpec(selector=selector, gates=gates),
        shared_width=2 * F,
    )
    named = fused(tensors) | shared(tensors, "shared_experts")
    made.gate.e_score_correction_bias -= 1  # ranks of both signs, so that masking with 0 shows
    bias_E = made.gate.e_score_correction_bias.numpy()
    compare(spec, named | {"router.selector.bias": bias_E}, made)


@pytest.mark.parametrize("order", [1.0, 2.0, None])
def test_dbrx(order):
    """Catches a sum in place of the p-norm, and down projections that are transposed."""
    package = pytest.importorskip("transformers")
    ffn = {
        "hidden_size": D,
        "ffn_hidden_size": F,
        "moe_num_experts": E,
        "moe_top_k": K,
        "moe_normalize_expert_weights": order,
    }
    config = package.DbrxConfig(d_model=D, ffn_config=ffn)
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    torch.manual_seed(0)
    made = DbrxFFN(config).eval()
    for tensor in made.state_dict().values():
        tensor.normal_(0, 0.6)
    tensors = {name: t.double().numpy() for name, t in made.state_dict().items()}
    w1, v1, w2 = (tensors[f"experts.mlp.{name}"].reshape(E, F, D) for name in ("w1", "v1", "w2"))
    named = {
        "router.scores.kernel": tensors["router.layer.weight"].T,
        "experts.gate": w1.swapaxes(1, 2),
        "experts.up": v1.swapaxes(1, 2),
        "experts.down": w2,
    }
    gates = SoftmaxGates() if order is None else PNormGates(order=order)
    router = RouterSpec(selector=TopK(k=K), gates=gates)
    compare(MoESpec(experts=E, width=F, router=router), named, made)


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_phimoe(jitter):
    """Catches gates that are normalised together, and a second draw that sees the first expert.

    At jitter 0.3 several experts are near, so that the mask of each draw shows in its gate.
    """
    made, tensors = built(
        "phimoe",
        "PhimoeConfig",
        "PhimoeSparseMoeBlock",
        {
            "hidden_size": D,
            "intermediate_size": F,
            "num_local_experts": E,
            "num_experts_per_tok": 2,
            "router_jitter_noise": jitter,
        },
    )
    router = RouterSpec(selector=TopK(k=2), gates=SparseMixerGates(jitter=jitter))
    named = fused(tensors, "router.weight")
    x_TxD, expected, bound = compare(MoESpec(experts=E, width=F, router=router), named, made)
    joint = RouterSpec(selector=TopK(k=2), gates=SoftmaxGates(renormalise=True))
    other = output(MoESpec(experts=E, width=F, router=joint), named, x_TxD)
    assert np.abs(other - expected).max() > 100 * bound


def test_gpt_oss():
    """Catches biases left out, gate and up not interleaved, and a clamp on the wrong side."""
    made, tensors = built(
        "gpt_oss",
        "GptOssConfig",
        "GptOssMLP",
        {
            "hidden_size": D,
            "intermediate_size": F,
            "num_local_experts": E,
            "num_experts_per_tok": K,
            "swiglu_limit": 1.5,
        },
    )
    gate_up, gate_up_bias = tensors["experts.gate_up_proj"], tensors["experts.gate_up_proj_bias"]
    named = {
        "router.scores.kernel": tensors["router.weight"].T,
        "router.scores.bias": tensors["router.bias"],
        "experts.gate": gate_up[..., ::2],
        "experts.up": gate_up[..., 1::2],
        "experts.down": tensors["experts.down_proj"],
        "experts.gate_bias": gate_up_bias[..., ::2],
        "experts.up_bias": gate_up_bias[..., 1::2],
        "experts.down_bias": tensors["experts.down_proj_bias"],
    }
    router = RouterSpec(
        selector=TopK(k=K), gates=ChosenSoftmaxGates(), scores=LinearScores(bias=True)
    )
    spec = MoESpec(
        experts=E,
        width=F,
        router=router,
        activation=ClampedSwiGLU(limit=1.5),
        expert_bias=True,
    )
    compare(spec, named, made)


def test_granitemoe():
    """Catches a softmax over all experts before the choice, without renormalising."""
    made, tensors = built(
        "granitemoe",
        "GraniteMoeConfig",
        "GraniteMoeMoE",
        {
            "hidden_size": D,
            "intermediate_size": F,
            "num_local_experts": E,
            "num_experts_per_tok": K,
        },
    )
    router = RouterSpec(selector=TopK(k=K), gates=ChosenSoftmaxGates())
    named = fused(tensors, "router.weight")
    compare(MoESpec(experts=E, width=F, router=router), named, made)


@pytest.mark.parametrize("k", [1, 2])
def test_hunyuan_v1_moe(k):
    """Catches p[argmax] as the gate of top-1, which Hunyuan-Large has and this class has not."""
    made, tensors = built(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        "HunYuanMoEV1Moe",
        {"hidden_size": D, "intermediate_size": F, "num_experts": E, "moe_topk": k},
    )
    router = RouterSpec(selector=TopK(k=k), gates=SoftmaxGates(renormalise=True))
    named = fused(tensors, "gate.wg.weight") | shared(tensors, "shared_mlp")
    spec = MoESpec(experts=E, width=F, router=router, shared_width=F)
    x_TxD, expected, bound = compare(spec, named, made)
    plain = RouterSpec(selector=TopK(k=k), gates=SoftmaxGates())
    large = MoESpec(experts=E, width=F, router=plain, shared_width=F)
    assert np.abs(output(large, named, x_TxD) - expected).max() > 100 * bound
