"""What the benchmarks claim, on made-up rows and on kernels priced without a compiler."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from moejax_kernels.chips import V5E
from moejax_kernels.shapes import MIXTRAL, OLMOE, Experts

from experiments.benchmarks import bars, cpu, megablox, page, results, tpu

TINY = Experts("tiny", 16, 24, 4, 2)


def row(contender, modelled, **more):
    same = {"chip": "v5e", "shape": "olmoe/4096/gate", "sizes": "balanced"}
    return same | {"contender": contender, "modelled": modelled, "useful": 0.5, "spills": 3} | more


def test_bars_compare_with_the_best_tiling_of_the_same_row():
    """Catches the first tiling taken for the best, and rows of other chips or group sizes mixed."""
    rows = [
        row("ours bf16", 90.0),
        row("megablox a", 200.0),
        row("megablox b", 100.0),
        row("megablox b", 10.0, sizes="skewed"),
        row("megablox b", 10.0, chip="v6e"),
        row("megablox c", 1.0, failure="out of memory"),
    ]
    assert bars.over_megablox(rows) == {"v5e olmoe/4096/gate balanced": 0.9}
    assert bars.useful(rows) == {"v5e olmoe/4096/gate balanced": 0.5}


def test_what_hbm_forbids_is_told_from_what_the_kernel_misses():
    """Catches a kernel at its HBM bound blamed, and a slow kernel excused by the bound."""
    rows = [
        row("ours bf16", 100.0, bound=99.0, over_bound=100 / 99),
        row("megablox a", 100.0),
        row("ours bf16", 100.0, bound=50.0, over_bound=2.0, chip="v6e"),
        row("megablox a", 100.0, chip="v6e"),
    ]
    line = bars.table(bars.TPU_BARS[:1], rows, {bars.TPU_BARS[0].name: "stores"}).splitlines()[2]
    assert "0 of 2; 1 out of reach of any kernel, by HBM alone: stores" in line


def test_few_bits_are_held_to_the_larger_bound():
    """Catches 2 bits held to HBM alone where loading the matrix unit takes longer."""
    small = {"shape": "olmoe/8/gate"}
    rows = [
        row("ours bf16", 900.0, cycles=200.0, bound=900.0, **small),
        row("ours int2 g128", 220.0, cycles=220.0, bound=110.0, **small),
        row("ours int3 g128", 330.0, cycles=220.0, bound=300.0, **small),
    ]
    figures = sorted(bars.over_push(rows).values())
    assert figures == pytest.approx([1.1, 1.1])


def test_a_missed_bar_is_not_called_met():
    """Catches a table whose worst figure is the best one, or in which a miss is silent."""
    bar = bars.Bar("time", 1.0, True, lambda rows: {"a": 0.5, "b": 1.5})
    other = bars.Bar("share", 1.0, False, lambda rows: {"a": 0.5, "b": 1.5})
    text = bars.table([bar, other], [], {"time": "loads"})
    assert "| 1.5 | b | 1 of 2: loads |" in text and "| 0.5 | a | 1 of 2: cause not" in text
    assert "not measured" in bars.table([bars.TPU_BARS[0]], [], {})


def test_every_bar_can_be_measured(tmp_path):
    """Catches bars whose rows no benchmark writes: each must see the figure planted for it."""
    names = ["bf16", "int8 g128", "int4 g128", "int3 g128", "int2 g128", "int3 g128 + rank 32"]
    numbers = {"cycles": 2.0, "bound": 1.0, "over_bound": 2.0, "hbm_cycles": 1, "microseconds": 1}
    rows = [
        row(name, 2.0, shape=shape, **numbers)
        for shape in ("olmoe/8/gate", "olmoe/4096/gate")
        for name in (*(f"ours {name}" for name in names), "megablox 1x2x3")
    ]
    assert all(bar.measure(rows) for bar in bars.TPU_BARS)
    results.record(tmp_path / "tpu.json", "tpu", rows, missing=["qwix"])
    page.write(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "qwix was not installed" in text and "ours int2 g128" in text
    assert "not measured" not in text and "Not measured yet: v5e olmoe/8/down" in text


def test_a_run_replaces_what_it_measured_and_nothing_else(tmp_path):
    """Catches a run of one model that wipes the other's rows, and old figures beside new ones."""
    path = tmp_path / "tpu.json"
    results.record(path, "first", [row("a", 1.0), row("b", 2.0)])
    results.record(path, "second", [row("b", 3.0), row("b", 4.0, chip="v6e")])
    results.record(path, "second", [row("c", 5.0)])
    runs = results.load(path)
    found = [(run["command"], [one["modelled"] for one in run["rows"]]) for run in runs]
    assert found == [("first", [1.0]), ("second", [3.0, 4.0, 5.0])]
    results.record(path, "third", [row("a", 6.0)])
    assert [run["command"] for run in results.load(path)] == ["second", "third"]


def test_megablox_visits_shared_tiles_twice():
    """Catches row tiles counted once that two groups share, and empty groups that are visited."""
    np.testing.assert_array_equal(megablox.visits(np.array([100, 0, 156, 256]), 128), [1, 0, 2, 2])
    shape = OLMOE.gate(4096)
    sizes = np.full(64, 512, np.int32)
    exact = 2 * (2 * 32768 * 2048 + 64 * 2048 * 1024 + 32768 * 1024)
    assert megablox.traffic(shape, (128, 2048, 512), sizes) == exact
    tilings = megablox.tilings_of(MIXTRAL.gate(4096), V5E)
    assert all(8192 % m == 0 for m, _, _ in tilings) and len(tilings) > 20


def test_names_of_shapes():
    """Catches a misspelt shape that silently measures nothing."""
    assert [shape.name for shape in tpu.named(["olmoe/8"])] == ["olmoe/8/gate", "olmoe/8/down"]
    with pytest.raises(ValueError, match="olmo/8"):
        tpu.named(["olmo/8"])


def test_the_layer_timed_is_the_layer():
    """Catches a benchmark that is fast because it computes something else."""
    bank = cpu.weights(TINY)
    x, index, gate = cpu.routes(TINY.gate(7), 0.0)
    y = jax.jit(cpu.experts, static_argnums=0)(cpu.dense, x, index, gate, bank)
    expected = np.zeros_like(x)
    for token in range(7):
        for expert, weight in zip(np.asarray(index[token]), np.asarray(gate[token]), strict=True):
            hidden = jax.nn.silu(x[token] @ bank["gate"][expert]) * (x[token] @ bank["up"][expert])
            expected[token] += weight * (hidden @ bank["down"][expert])
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parity
def test_transformers_computes_the_same_layer():
    """Catches gate and up exchanged, or weights not transposed, in the layer we compare with."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    bank = cpu.weights(TINY)
    given = cpu.routes(TINY.gate(7), 0.0)
    seen = []
    forward = OlmoeExperts.forward

    class Recorded(OlmoeExperts):
        def forward(self, *arrays):
            seen.append(forward(self, *arrays))
            return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.olmoe.modeling_olmoe.OlmoeExperts", Recorded)
        calls = cpu.torch_calls(bank, TINY.gate(7), given)
        for call in calls.values():
            call()
    assert set(calls) == {"transformers eager", "transformers grouped_mm"}
    y = jax.jit(cpu.experts, static_argnums=0)(cpu.dense, *given, bank)
    for other in seen:
        np.testing.assert_allclose(y, other.numpy(), atol=1e-4)
