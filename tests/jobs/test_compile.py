"""Steps compiled for pods that nobody has: the parts of the job, one small pod for real."""

import dataclasses
import importlib.util

import pytest
from moejax_kernels import aot

from moejax.config import load_config
from moejax.core import ConfigError, RunError, SpecError, parts
from moejax.jobs import compile as compiling
from moejax.jobs.compile import Compile
from moejax.jobs.pod_advice import advice
from moejax.jobs.pod_steps import PodDecodeStep, PodTrainStep, bytes_on_device
from moejax.mesh import MeshSpec, Rules
from moejax.models import KeepDispatch, LayerSpec, ModelSpec, even_attention
from moejax.moe import MoESpec, PaddedAllToAll, RouterSpec, SoftmaxGates, TopK, TopKLoadBalance
from moejax.report.pods import draw_pod, pod_markdown, pod_text
from moejax.runs import RunFolder

LAYERS, D, F, E, K = 3, 128, 128, 4, 2
BATCH, LENGTH = 8, 64
MODEL = ModelSpec(
    vocab=512,
    width=D,
    layers=(
        LayerSpec(
            mixer=even_attention(D, 2, 2),
            ffn=MoESpec(
                experts=E,
                width=F,
                router=RouterSpec(selector=TopK(k=K), gates=SoftmaxGates()),
            ),
        ),
    )
    * LAYERS,
)
JOB = Compile(
    model=MODEL,
    steps=(
        PodTrainStep(batch=BATCH, length=LENGTH, losses=(TopKLoadBalance(),), remat=KeepDispatch()),
    ),
    topology="v5e:2x2",
    mesh=MeshSpec(fsdp=2, expert=2),
    strategy=PaddedAllToAll(factor=1.0),
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: aot)"
)


@needs_libtpu
def test_small_pod(tmp_path):
    """Fails where layers of a scan count once, where the backward pass computes the exchange again
    in spite of the remat policy, where a collective is put on another axis than it runs over, or
    where memory of the whole mesh is given as that of a device."""
    folder = RunFolder.create(tmp_path / "pod", "Compile", "", [])
    with folder:
        JOB.run(folder)
    facts = compiling.read_facts(folder.path)
    (step,) = facts["steps"].values()
    assert step["fits"] and step["advice"] == [] and step["unknown_loops"] == []

    work = {part["name"]: part for part in step["parts"]}
    assert {parts.ATTENTION, parts.ROUTER, parts.EXPERTS, parts.HEAD, parts.OPTIMIZER} <= set(work)
    rows = BATCH * LENGTH * K / JOB.pod.devices
    useful = LAYERS * 2 * 3 * D * F * rows  # forward, of gate, up and down
    # Three products forward, three times two backward, and what the policy does not keep again.
    assert 3 * useful <= work[parts.EXPERTS]["flops"] <= 4.2 * useful

    by_kind = {(one["kind"], one["axes"]): one for one in step["collectives"]}
    exchanged = by_kind["all-to-all", "expert"]
    assert exchanged["runs"] == 4 * LAYERS  # there and back, forward and backward
    block = rows * D * 2  # bfloat16 rows of a device, half of which leave it
    assert exchanged["bytes"] == pytest.approx(4 * LAYERS * block / 2)

    held = sum(step["held"].values())
    assert held <= step["memory"]["arguments"] <= 1.2 * held + 2**20
    page = (folder.path / "report.md").read_text()
    assert page.strip() == pod_markdown(facts).strip()
    assert (folder.path / "plots" / "steps.png").stat().st_size > 10_000


def test_state_of_a_device():
    """Fails where optimizer state is not cut as its parameters are: AdamW holds twice them."""
    program = JOB.steps[0].program(MODEL, JOB.parallel)
    trained, frozen = program.held["parameters"]
    assert frozen == {}
    ratio = bytes_on_device(program.held["optimizer"]) / bytes_on_device(trained)
    assert ratio == pytest.approx(2, abs=1e-3)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in trained.values())
    assert bytes_on_device(trained) < 0.6 * whole


def test_state_of_sequences_is_cut_over_devices():
    """Fails where every device would hold the cache of all sequences."""
    short, long = (PodDecodeStep(batch=8, length=n) for n in (64, 128))
    sizes = [
        bytes_on_device(step.program(MODEL, JOB.parallel).held["sequence state"])
        for step in (short, long)
    ]
    per_token = 8 / 4 * LAYERS * 2 * D * 2
    assert sizes[1] - sizes[0] == pytest.approx(64 * per_token, rel=0.05)


def test_no_compiler(tmp_path, monkeypatch):
    """Fails where a missing compiler ends in a traceback, or after the model was traced."""

    def missing(platform):
        raise aot.CompilerMissing("The CUDA compiler is not installed: pip install 'jax[cuda13]'.")

    monkeypatch.setattr(aot, "compiler_version", missing)
    job = dataclasses.replace(JOB, topology="h100x4")
    with (
        pytest.raises(RunError, match="h100x4 wants it") as raised,
        RunFolder.create(tmp_path / "gpu", "Compile", "", []) as folder,
    ):
        job.run(folder)
    assert "pip install 'jax[cuda13]'" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"topology": "v5p:8x8"}, "topology"),
        ({"mesh": MeshSpec(fsdp=3)}, "fsdp"),
        ({"steps": ()}, "steps"),
    ],
)
def test_bad_jobs(changes, field):
    """Fails where a job that cannot be compiled is found out by the compiler."""
    with pytest.raises(SpecError) as raised:
        dataclasses.replace(JOB, **changes)
    assert raised.value.field == field


def test_a_training_config_is_compiled_as_it_trains():
    """Fails where what is compiled for a pod is not the step that the same config runs."""
    job = load_config("train/nano").job()
    made = compiling.for_pod(job, "v5e:2x2")
    (step,) = made.steps
    for field in ("batch", "length", "accumulate", "optimizer", "losses", "compute_dtype", "remat"):
        assert getattr(step, field) == getattr(job, field)
    assert made.model == job.model and made.mesh.resolved(4).fsdp == 4
    with pytest.raises(ConfigError, match="no topology"):
        compiling.for_pod(job, None)
    with pytest.raises(ConfigError, match="no step"):
        compiling.for_pod(object(), "v5e:2x2")


def test_advice_for_what_is_held():
    """Fails where a state that is too large is answered with a smaller batch, which leaves it."""
    mesh = MeshSpec(data=4, expert=2)
    said = advice(JOB.steps[0], mesh, Rules(), {"parameters": 20e9, "optimizer": 40e9}, 65e9, 16e9)
    assert said[0].startswith("MeshSpec.fsdp = 4 and MeshSpec.data = 1")
    assert any("Rules.embed" in line for line in said)


def test_advice_for_what_passes():
    """Fails where activations that are too large are answered with finer cut parameters."""
    step = PodTrainStep(batch=64, length=4096)
    said = advice(step, MeshSpec(fsdp=4), Rules(), {"parameters": 1e9}, 40e9, 16e9)
    assert said[0].startswith("accumulate = 4: 16 rows at a time instead of 64")
    assert advice(step, MeshSpec(fsdp=4), Rules(), {"parameters": 1e9}, 15e9, 16e9) == []


def test_refused_for_memory(monkeypatch, tmp_path):
    """Fails where a program that the compiler refuses for memory leaves no report with advice."""

    def refused(self, name, program):
        raise aot.CompileError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.")

    monkeypatch.setattr(Compile, "_report", refused)
    found = JOB.compiled(JOB.steps[0])
    assert not found["fits"] and found["memory"]["used"] == 20.5 * 2**30 and found["advice"]
    facts = {"topology": "v5e:2x2", "devices": 4, "hbm": 16e9, "mesh": "fsdp 2, expert 2"}
    facts |= {"strategy": "x", "compiler": "y", "steps": {"train": found}}
    assert "does not fit, 22.0 of 16 GB" in pod_text(facts)
    compiling.write_json(tmp_path / "compile.json", facts)
    draw_pod(tmp_path / "compile.json")
