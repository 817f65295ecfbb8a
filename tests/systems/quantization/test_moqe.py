"""MoQE (arXiv:2310.02410): experts tolerate low bits better than attention and dense layers do."""

import math

import pytest

from moejax.config import load_config
from moejax.runs import RunFolder, StudyResult

SYSTEM = "systems/quantization/moqe"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The system's own config on 32 KiB of each group."""
    config = load_config(SYSTEM, ["text/Text.bytes_per_group = 32768"])
    folder = RunFolder.create(
        tmp_path_factory.mktemp("moqe") / "run", "Study", config.text, ["moejax", "run", SYSTEM]
    )
    config.job().run(folder)
    return StudyResult.load(folder.results_path)


def damage_per_megabyte(study, name):
    """Relative change of perplexity per 10^6 bytes of 16-bit weights that were quantized."""
    arm = study.arm(name)
    base = study.arm(arm.base)
    saved = base.stored_bytes - arm.stored_bytes
    quantized = saved / (1 - arm.bits_per_weight / 16)
    return math.expm1(arm.average.delta_nll) / (quantized / 1e6)


@pytest.mark.slow
def test_four_bit_experts_cost_under_one_per_cent(study):
    """Catches scales that are shared too widely, and codes that are clipped at the wrong end."""
    arm = study.arm("experts, 4 bits")
    assert math.expm1(arm.average.delta_nll) < 0.01
    assert arm.code_bits == 4


@pytest.mark.slow
def test_experts_tolerate_two_bits_better_than_attention_and_dense_layers(study):
    """Catches a study that quantizes other matrices than its arms say."""
    experts = damage_per_megabyte(study, "experts, 2 bits")
    assert experts < damage_per_megabyte(study, "attention, 2 bits")
    assert experts < damage_per_megabyte(study, "dense twin, 2 bits")


@pytest.mark.slow
def test_average_bits_are_the_bytes_on_disk(study):
    """Catches bits that leave out scales and zeros."""
    for name in ("experts, 4 bits", "experts, 2 bits"):
        arm, base = study.arm(name), study.arm("reference")
        others = base.stored_bytes - base.expert_bytes
        assert arm.stored_bytes - others == arm.expert_bytes
        assert arm.bits_per_weight == pytest.approx(16 * arm.expert_bytes / base.expert_bytes)
