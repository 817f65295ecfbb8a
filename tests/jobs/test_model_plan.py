"""Released models as configs: planned without weights, to the digits that are published."""

import dataclasses
import io

import pytest
from rich.console import Console

from moejax.config import load_config
from moejax.core import SpecError
from moejax.jobs.model_plan import PlanModel, published, short
from moejax.mesh import MeshSpec, bytes_per_device
from moejax.models import abstract_model, count_parameters, parameters

ALONE = {"ModelSpec": ("run.job = @PlanModel()", "PlanModel.model = @ModelSpec()")}

# Billions summed tensor by tensor from the released dimensions: total, active with both embedding
# matrices, with the output matrix alone, with none; then what the release or its paper prints.
RELEASED = {
    "mixtral": ((46.703, 12.880, 12.749, 12.618), "46.7B", "12.9B"),
    "mixtral_8x22b": ((140.630, 39.161, 38.960, 38.759), "141B", "39B"),
    "olmoe": ((6.919, 1.282, 1.179, 1.076), "6.92B", "1.3B"),
    "qwen15_moe": ((14.316, 2.689, 2.378, 2.067), "14.3B", "2.7B"),
    "qwen2_57b_a14b": ((57.409, 14.249, 13.705, 13.160), "57.4B", "14B"),
    "deepseek_moe": ((16.376, 2.829, 2.619, 2.409), "16.4B", "2.8B"),
    "deepseek_v2": ((235.741, 21.376, 20.852, 20.327), "236B", "21B"),
    "deepseek_v2_lite": ((15.706, 2.661, 2.451, 2.242), "15.7B", None),
    "deepseek_v3": ((671.026, 37.552, 36.626, 35.699), "671B", None),
    "dbrx": ((131.597, 36.470, 35.853, 35.237), "132B", "36B"),
    "phi35_moe": ((41.873, 6.641, 6.510, 6.378), "41.9B", "6.6B"),
    "grin_moe": ((41.873, 6.641, 6.510, 6.378), None, "6.6B"),
    "grok1": ((315.685, 83.757, 82.951, 82.951), None, None),
    "arctic": ((478.585, 17.319, 17.089, 16.860), None, "17B"),
    "skywork_moe": ((146.356, 22.691, 22.389, 22.087), "146B", None),
    "yuan2": ((39.943, 3.704, 3.427, 3.427), None, "3.7B"),
    "llama_moe": ((6.741, 3.494, 3.363, 3.232), "6.7B", "3.5B"),
    "openmoe": ((11.855, 3.802, 3.277, 2.752), None, None),
    "openmoe_paper": ((8.780, 2.740, 2.215, 2.215), None, None),
    "hunyuan_large": ((388.701, 51.322, 50.496, 50.496), "389B", None),
}


def planned(name, bindings=()):
    return load_config(f"models/{name}", bindings, ALONE).job()


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_published_size(name):
    """Catches a wrong width, head, expert or layer in a shipped config, and a matrix counted twice
    or not at all."""
    billions, total, active = RELEASED[name]
    counts = dataclasses.astuple(count_parameters(planned(name).model))
    assert [round(count / 1e9, 3) for count in counts] == list(billions)
    for found, printed in ((counts[0], total), (counts[1], active)):
        if printed is not None:
            digits = len(printed.removesuffix("B").partition(".")[2])
            assert f"{found / 1e9:.{digits}f}B" == printed


def test_a_plan_tells_what_a_reader_asks_for():
    """Catches a plan that loads weights, counts whole banks on every device, or fits everything."""
    plan = planned("mixtral").plan()
    text = str(plan)
    assert text.startswith("46.7B parameters, 12.9B active")
    _, formats, places = plan.tables
    size = {row[0]: float(row[1].replace(",", "")) for row in formats[2]}
    assert size["bfloat16"] == 2 * 46_702_792_704
    assert (
        size["2 bits"] < size["3 bits"] < size["4 bits"] < size["8 bits"] < size["bfloat16"] / 1.8
    )
    devices = {row[0]: row[1:] for row in places[2]}
    assert devices["one H100 (whole)"][0] == "93.4 of 80"
    assert devices["8 H100 (expert 8)"][0] == "14.5"
    console = Console(file=io.StringIO(), width=120)
    assert max(map(len, text.splitlines())) <= console.width


def test_what_lies_on_a_device_is_a_share_of_what_is_cut():
    """Catches routers and embeddings cut over the expert axis, and codes without their scales."""
    named = parameters(abstract_model(planned("nano").model))
    banks = {name: ".moe.experts." in name for name in named}
    one = bytes_per_device(named, MeshSpec(), banks, 2)
    assert one == 2 * sum(count_size(w) for w in named.values())
    experts = 2 * sum(count_size(w) for name, w in named.items() if banks[name])
    assert bytes_per_device(named, MeshSpec(expert=4), banks, 2) == one - experts + experts // 4
    assert bytes_per_device(named, MeshSpec(data=8), banks, 2) == one
    assert one / 8 <= bytes_per_device(named, MeshSpec(fsdp=8), banks, 2) < one / 7
    with pytest.raises(SpecError, match="does not divide"):
        bytes_per_device(named, MeshSpec(expert=3), banks, 2)


def count_size(weight):
    size = 1
    for n in weight.shape:
        size *= n
    return size


def test_widths_that_a_format_cannot_have_are_said():
    """Catches a plan that dies of one format, or leaves it out without a word."""
    job = planned("llama_moe", ["PlanModel.bits=(4,)"])
    (row,) = [row for row in job.plan().tables[1][2] if row[0] == "4 bits"]
    assert "128 does not divide the 688" in row[1]


def test_counts_are_printed_as_papers_do():
    """Catches millions called billions, and a sum of the wrong three counts."""
    assert [short(n) for n in (671_026_404_352, 1_282_000_000, 8_145_152, 950)] == [
        "671.0B",
        "1.28B",
        "8.15M",
        "950",
    ]
    text = published(planned("olmoe").model)
    assert text.startswith("6.92B parameters, 1.28B active") and "1.08B with none" in text


def test_what_cannot_be_planned_is_refused():
    """Catches a plan of no tokens, and meshes without devices."""
    model = planned("nano").model
    with pytest.raises(SpecError, match="context"):
        PlanModel(model=model, context=0)
    for axis in ("data", "fsdp", "expert", "memory_gb"):
        with pytest.raises(SpecError, match=axis):
            MeshSpec(**{axis: 0})
