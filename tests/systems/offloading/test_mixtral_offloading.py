"""Mixtral-Offloading (arXiv:2312.17238), its quantization: HQQ of experts and attention."""

import pytest

from tests.systems.running import run_system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_system("offloading/mixtral_offloading", tmp_path_factory.mktemp("mixtral"))


def test_bytes_are_bits_and_overhead(ran):
    """Catches scales and zeros that are left out of the count."""
    arm = ran.result.arm("attention 4 bits, experts 2 bits")
    rows = [r for r in ran.ledger.last(arm.name).values() if "experts" in r.matrix]
    assert {row.code_bits for row in rows} == {2}
    per_weight = 8 * sum(row.stored_bytes for row in rows) / (len(rows) * 256 * 128)
    assert per_weight == pytest.approx(2 + 32 / 16)
    assert arm.expert_bytes == sum(row.stored_bytes for row in rows)


def test_attention_deserves_four_bits(ran):
    """Catches a recipe that quantizes experts twice and attention never."""
    mixed = ran.damage("attention 4 bits, experts 2 bits")
    assert ran.damage("attention 4 bits alone") < mixed
    assert mixed < ran.damage("attention 2 bits, experts 2 bits")
    assert ran.damage("attention 4 bits, experts 3 bits") < mixed
