"""Families that transformers has no class for, against references written from their formulas."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checkpoint import Imported, export_model, family_of, import_model
from moejax.checkpoint.config_reader import ConfigReader
from moejax.checkpoint.importing import read_spec
from moejax.core import CheckpointError
from moejax.files import open_tensors
from moejax.moe import Dropless
from tests.checkpoint.hf_folders import write_folder
from tests.parity import harness
from tests.parity.harness import BATCH, BOUND, CUTS, LEAST_SHARE, LENGTH, VISIBLE, error
from tests.parity.references import (
    arctic,
    deepseek,
    grok,
    hunyuan,
    llama_moe,
    openmoe,
    skywork,
    yuan,
)

pytestmark = pytest.mark.parity


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """A reference and what a case changes in its config. gain: of the matrices of experts."""

    module: ModuleType
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gain: float = 3.0
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.module.__name__.rsplit(".", 1)[1]

    @property
    def config(self) -> dict[str, Any]:
        return self.module.CONFIG | self.changes

    def logits(self, tensors: Mapping[str, np.ndarray], tokens: np.ndarray, cuts) -> np.ndarray:
        """In float64. cuts: for a family whose tokens compete for room with those beside them."""
        wide = {name: value.astype(np.float64) for name, value in tensors.items()}
        if hasattr(self.module, "logits_of_batch"):
            return self.module.logits_of_batch(self.config, wide, tokens, cuts)
        return np.stack([self.module.logits(self.config, wide, text) for text in tokens])


CASES = (
    Reference(deepseek),
    Reference(grok),
    Reference(arctic),
    Reference(skywork),
    Reference(yuan),
    Reference(openmoe),
    Reference(llama_moe),
    Reference(hunyuan, gain=4.0),
)
VARIANTS = (  # what a config may say too
    Reference(deepseek, {"norm_topk_prob": True}, name="deepseek_renormalised"),
    Reference(arctic, {"moe_layer_frequency": 2}, name="arctic_with_dense_layers"),
    Reference(arctic, {"parallel_attn_mlp_res": False}, name="arctic_moe"),
    Reference(
        skywork,
        {"moe_feature_no_mul_topk": True, "moe_expert_interval": 2},
        name="skywork_with_dense_layers",
    ),
    Reference(
        skywork, {"moe_2layer_gate": False, "moe_use_logits_norm": False}, name="skywork_linear"
    ),
    Reference(llama_moe, {"gate_network": "linear", "size_experts": None}, name="llama_moe_linear"),
    Reference(
        yuan,
        {"moe_config": yuan.CONFIG["moe_config"] | {"norm_topk_prob": False}},
        gain=4.0,
        name="yuan_not_renormalised",
    ),
    Reference(openmoe, {"router_topk": 1, "router_capacity_factor_eval": 2.0}, name="openmoe_top1"),
    Reference(
        hunyuan,
        {"moe_topk": 3, "use_cla": False, "rope_scaling": None, "tie_word_embeddings": False},
        name="hunyuan_top3",
    ),
)


@dataclasses.dataclass(frozen=True)
class Both:
    """The model as tensors under the release's names, and as we import it from them."""

    tensors: Mapping[str, np.ndarray]
    tokens: np.ndarray
    expected: np.ndarray
    imported: Imported


@functools.cache
def both(case: Reference, seed: int) -> Both:
    """A random model of the case; made once per process."""
    random = np.random.default_rng(seed)
    tensors = {
        name: _drawn(random, name, shape, case.gain)
        for name, shape in case.module.shapes(case.config).items()
    }
    folder = Path(tempfile.mkdtemp(prefix=f"reference-{case}-")) / "model"
    write_folder(folder, case.config, tensors)
    tokens = random.integers(0, case.config["vocab_size"], (BATCH, LENGTH))
    expected = case.logits(tensors, tokens, (0, LENGTH))
    return Both(tensors, tokens, expected, import_model(folder, dtype=jnp.float32))


def _drawn(random: np.random.Generator, name: str, shape: tuple[int, ...], gain: float):
    """Maps keep the scale of what they map, experts raise it; no norm or bias is at rest."""
    noise = random.normal(size=shape)
    if "embed" in name:
        return noise.astype(np.float32)
    if len(shape) == 1:
        return ((0.0 if name.endswith("bias") else 1.0) + 0.1 * noise).astype(np.float32)
    # Banks of experts are [E, in, out], convolutions [out, in, 2, 1], all others [out, in].
    inputs = shape[1] if len(shape) == 3 else np.prod(shape[1:])
    return ((gain if "experts" in name else 1.0) * inputs**-0.5 * noise).astype(np.float32)


MAIN = {"arctic", "openmoe", "hunyuan"}  # whose layers are put together as no other family's are


def cases(chosen):
    """One worker has all tests of a case, which share its model and compiled programs.

    Those that are not MAIN are slow.
    """

    def marks(case):
        group = pytest.mark.xdist_group(str(case))
        return (group,) if str(case) in MAIN else (group, pytest.mark.slow)

    marked = [pytest.param(case, marks=marks(case)) for case in chosen]
    return pytest.mark.parametrize("case", marked, ids=[str(case) for case in chosen])


each = cases(CASES)
seeded = pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])


@each
@seeded
def test_prefill_gives_the_reference_s_logits(case, seed):
    """Catches a wrong name map, gates weighed wrongly, a norm, multiplier or cap left out."""
    pair = both(case, seed)
    assert error(harness.prefill(pair.imported.model, pair.tokens), pair.expected) <= BOUND


@each
@seeded
def test_decoding_gives_the_reference_s_logits(case, seed):
    """Catches keys cached with a norm that another layer has, a filter that forgets a token."""
    pair = both(case, seed)
    expected = pair.expected
    if hasattr(case.module, "logits_of_batch"):
        expected = case.logits(pair.tensors, pair.tokens, CUTS)
    assert error(harness.decode(pair.imported.model, pair.tokens), expected) <= BOUND


@each
@seeded
def test_faults_in_the_experts_would_show(case, seed):
    """Catches a parity test that sees nothing: experts so quiet that any router passes."""
    pair = both(case, seed)
    model = pair.imported.model
    shares = harness.routed_shares(model, pair.tokens)
    assert min(shares) >= LEAST_SHARE, shares
    swapped = harness.with_experts_swapped(model, pair.tokens)
    assert error(harness.prefill(swapped, pair.tokens), pair.expected) >= VISIBLE * BOUND
    raw = harness.without_renormalisation(model)
    if raw is not None:
        assert error(harness.prefill(raw, pair.tokens), pair.expected) >= VISIBLE * BOUND


@each
@seeded
def test_the_export_has_the_same_tensors(case, seed, tmp_path):
    """Catches a rule whose inverse writes another name, order of heads or expert."""
    pair = both(case, seed)
    found = _exported(pair, tmp_path)
    used = {row.tensor for row in pair.imported.coverage.rows if row.use == "used"}
    assert set(found) == used
    for name in used:
        np.testing.assert_array_equal(found[name].read(), pair.tensors[name], err_msg=name)
    again = import_model(tmp_path / "out", dtype=jnp.float32)
    assert again.family is pair.imported.family
    assert again.model.spec == pair.imported.model.spec


@pytest.mark.slow
@cases(VARIANTS)
def test_variants_of_a_config_do_too(case, tmp_path):
    """Catches a config field that is read and then not heeded."""
    pair = both(case, 0)
    assert error(harness.prefill(pair.imported.model, pair.tokens), pair.expected) <= BOUND
    found = _exported(pair, tmp_path)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), pair.tensors[name], err_msg=name)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS)


@given(case=st.sampled_from(CASES), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_config_gives_a_spec_or_a_named_error(case, data):
    """Catches a division by a size that is zero, a list where a number was meant, a raw error."""
    names = st.sampled_from(sorted(set(case.config) - {"model_type", "architectures"}))
    changed = case.config | data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    with contextlib.suppress(CheckpointError):
        read_spec(family_of(changed), ConfigReader(changed))


def _exported(pair: Both, folder: Path):
    imported = pair.imported
    export_model(folder / "out", imported.model, family=imported.family, config=imported.config)
    return open_tensors(folder / "out")


def test_openmoe_drops_tokens_here():
    """Catches a case that says nothing of room: without drops its logits would be the same."""
    pair = both(next(case for case in CASES if case.module is openmoe), 0)
    model = _with_dispatch(pair.imported.model, Dropless())
    assert error(harness.prefill(model, pair.tokens), pair.expected) >= VISIBLE * BOUND


def _with_dispatch(model, dispatch):
    layers = tuple(
        dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, dispatch=dispatch))
        if hasattr(layer.ffn, "dispatch")
        else layer
        for layer in model.spec.layers
    )
    spec = dataclasses.replace(model.spec, layers=layers)
    return harness.with_parameters(spec, harness.parameters(model))
