"""MC-MoE (arXiv:2410.06270): PMQ against other allocations, ODP against its controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import Calibration, ExpertCounts
from moejax.compress import DynamicSkip, compress
from moejax.jobs.model_source import SavedModel
from moejax.jobs.text import Text
from moejax.runs import Ledger
from tests.systems.running import run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("quantization/mc_moe", tmp_path_factory.mktemp("mc_moe"))


def test_random_allocations_take_as_many_bytes(ran):
    """Catches controls that lose because they store less."""
    size = ran.result.arm("PMQ, 2.5 bits").expert_bytes
    controls = [ran.result.arm(name) for name in ran.starting("at random")]
    assert len(controls) == 10
    assert all(abs(arm.expert_bytes / size - 1) < 0.005 for arm in controls)
    assert len({arm.average.delta_nll for arm in controls}) == 10


def test_pmq_beats_random_allocations(ran):
    """Catches costs in the wrong order, and a solver that maximises."""
    damages = [ran.damage(name) for name in ran.starting("at random")]
    assert ran.damage("PMQ, 2.5 bits") < np.mean(damages)


def test_every_layer_keeps_an_expert_at_two_and_one_at_three_bits(ran):
    """Catches a program without its constraints."""
    rows = ran.ledger.last("PMQ, 2.5 bits").values()
    for layer in range(4):
        bits = [r.code_bits for r in rows if r.layer == layer and r.matrix == "moe.experts.up"]
        assert len(bits) == 16 and sum(bits) <= 2.5 * 16
        assert 2 in bits and 3 in bits and set(bits) <= {1, 2, 3}


def test_protected_tokens_stay_closer_to_the_model(ran):
    """Catches a protection that protects nothing. Against protection at random, see the header."""
    divergence = {arm.name: arm.average.kl for arm in ran.result.arms}
    for name in ("ODP, 2 % protected", "skip, 2 % protected at random"):
        assert divergence[name] < divergence["skip, nothing protected"]


@pytest.mark.parametrize("layer", range(4))
def test_the_median_skips_half_of_the_tokens(layer):
    """Catches a threshold that is read from other gates than those it is compared with."""
    model = SavedModel(path="reference").load(jnp.bfloat16)
    batches = Text(bytes_per_group=16384).batches()[0]
    calibration, accumulators = Calibration(batches), (ExpertCounts(),)
    skipping = compress(
        model,
        [DynamicSkip(layers=(layer,))],
        calibration,
        key=jax.random.key(0),
        arm="skip",
        ledger=Ledger(),
    )
    before = calibration(model, accumulators).of(layer, ExpertCounts()).sum()
    after = calibration(skipping, accumulators).of(layer, ExpertCounts()).sum()
    tokens = before / 2
    assert (before - after) / tokens == pytest.approx(0.5, abs=0.01)
