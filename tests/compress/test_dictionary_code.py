"""QMoE as passes: ternary by GPTQ, layer by layer, then stored under the dictionary."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import load_model, save_model
from moejax.compress import GPTQ, DictionaryCode, Quantize, Sequential, account, check_recipe
from moejax.core import SpecError
from moejax.jobs.model_plan import model_bytes_per_device
from moejax.mesh import MeshSpec
from moejax.models import parameters
from moejax.weights import DictionaryCoded, Ternary, TernaryRows, materialize
from tests.compress.conftest import logits

TERNARY = Quantize(grid=TernaryRows(), method=GPTQ(damping=0.1, least_tokens=0.0))
QMOE = (Sequential(step=TERNARY), DictionaryCode())


def banks(model):
    return {n: w for n, w in parameters(model).items() if ".moe.experts." in n}


def test_the_code_changes_no_weight(applied, text, tmp_path):
    """Catches codewords of another expert or matrix, and what a file does not bring back."""
    coded, ledger = applied(*QMOE)
    plain, _ = applied(QMOE[0])
    for name, w in banks(coded).items():
        assert isinstance(w, DictionaryCoded) and isinstance(banks(plain)[name], Ternary)
        np.testing.assert_array_equal(materialize(w), materialize(banks(plain)[name]))
    np.testing.assert_allclose(logits(coded, text), logits(plain, text), atol=1e-5)
    rows = [row for row in ledger if row.pass_name == "DictionaryCode"]
    assert sum(row.stored_bytes for row in rows) == account(coded).expert_bytes
    one = model_bytes_per_device(coded, MeshSpec())
    experts = account(coded).expert_bytes
    assert model_bytes_per_device(coded, MeshSpec(expert=2)) == one - experts + experts // 2
    save_model(tmp_path / "model", coded, dtype=jnp.float32)
    again = load_model(tmp_path / "model", dtype=jnp.float32)
    np.testing.assert_array_equal(logits(again, text), logits(coded, text))


def test_only_ternary_weights_have_a_code(model):
    """Catches a dictionary that codes whatever has two bits."""
    with pytest.raises(SpecError, match=r"layers\.0.*plain array"):
        check_recipe([DictionaryCode()], model)
    with pytest.raises(SpecError, match="names embed"):
        check_recipe([DictionaryCode(parameters="embed")], model)


def test_gptq_beats_rounding(applied, model, source):
    """Catches three levels that GPTQ rounds to without handing errors on."""
    _, ledger = applied(QMOE[0])
    rows = [row for row in ledger if row.tokens >= 32]
    assert rows and np.mean([row.output_error < row.nearest_error for row in rows]) >= 0.95
