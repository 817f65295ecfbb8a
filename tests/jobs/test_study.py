"""Studies end to end on a small model: numbers, books, report and plan agree."""

import json

import jax
import numpy as np
import pytest

from moejax.checkpoint import load_model, stored_bytes
from moejax.compress import ExpertDrop, Frequency, Quantize
from moejax.core import CheckpointError, ConfigError, DataError, SpecError
from moejax.jobs import study as job_module
from moejax.jobs.expectations import Better, MeanBitsPerByte, NoDeadExpert, PerplexityChange
from moejax.jobs.model_source import SavedModel
from moejax.jobs.study import Arm, Compress, Study
from moejax.jobs.text import Text
from moejax.models import parameters
from moejax.runs import Ledger, StudyResult
from moejax.trace import RoutingTrace, popularity
from moejax.weights import Packed, SymmetricGrid

TEXT = Text(bytes_per_group=2048, window=32, batch=8)
CALIBRATION = Text(bytes_per_group=2048, skip_bytes=2048, window=32, batch=8)


@pytest.fixture(scope="module")
def study(saved):
    moe, dense = SavedModel(path=saved["moe"]), SavedModel(path=saved["dense"])
    grid = SymmetricGrid(bits=2, group=32)
    return Study(
        arms=(
            Arm(name="base", model=moe),
            Arm(name="2 bits", model=moe, recipe=(Quantize(grid=grid),), base="base"),
            Arm(
                name="drop half",
                model=moe,
                recipe=(ExpertDrop(fraction=0.5, score=Frequency()),),
                base="base",
            ),
            Arm(name="dense", model=dense, base="base"),
        ),
        text=TEXT,
        calibration=CALIBRATION,
        traces=("base", "drop half"),
        expectations=(
            PerplexityChange(arm="2 bits", at_least=-1e9, at_most=1e9),
            PerplexityChange(arm="2 bits", at_least=1e9),
            MeanBitsPerByte(arm="base", at_most=1e9),
            Better(arm="base", than="dense"),
            NoDeadExpert(arm="base"),
        ),
    )


@pytest.mark.xdist_group("study")
def test_study_agrees_with_its_plan_and_its_books(study, folder):
    """Catches a plan that counts other bytes than the run, and arms without a row or a score."""
    study.run(folder)
    result = StudyResult.load(folder.results_path)
    assert [arm.name for arm in result.arms] == ["base", "2 bits", "drop half", "dense"]
    planned = {row[0]: int(row[1].replace(",", "")) for row in study.plan().tables[1][2]}
    assert {arm.name: arm.stored_bytes for arm in result.arms} == planned
    base, two, half, _ = result.arms
    _traces_agree(study, folder, result)
    assert base.average.delta_nll is None and two.average.kl > 0
    np.testing.assert_allclose(
        two.average.delta_nll,
        (two.average.nll_sum - base.average.nll_sum) / base.average.tokens,
        rtol=1e-6,
    )
    experts = 2 * 3 * 4 * 32 * 32
    assert two.code_bits == 2 and two.expert_bytes == experts // 4 + 2 * experts // 32
    assert half.parameters == base.parameters - experts // 2 - 2 * 2 * 32
    assert [v.held for v in result.verdicts][:3] == [True, False, True]
    rows = list(Ledger.load(folder.ledger_path))
    assert len(rows) == 2 * (2 * 4 * 3)
    assert {row.arm for row in rows if row.dropped} == {"drop half"}
    assert folder.report_path.is_file()
    report = json.loads((folder.report_path.parent / "report.json").read_text())
    assert report and "2 bits" in folder.report_path.read_text()


def _traces_agree(study, folder, result):
    """Catches a trace of another arm, of padding, or of part of the text."""
    tokens = sum(score.tokens for score in result.arms[0].domains)
    for arm, experts in (("base", 4), ("drop half", 2)):
        trace = RoutingTrace.open(folder.traces / arm)
        assert len(trace) == tokens
        assert trace.layout.experts == (experts, experts)
        assert popularity(trace).sum() == 2 * 2 * tokens
    moe = study.arms[0].model.manifest().sha256
    RoutingTrace.open(folder.traces / "base", model=moe)
    with pytest.raises(DataError, match="is a trace of the model"):
        RoutingTrace.open(folder.traces / "drop half", model=moe)
    facts = json.loads((folder.path / "report.json").read_text())
    assert facts["traces"]["base"]["tokens"] == tokens
    assert (folder.plots / "cache-00-base.png").exists()


@pytest.mark.xdist_group("study")
def test_compress_saves_the_model_that_it_measured(saved, folder, monkeypatch):
    """Catches a saved model that is not the measured one, or not of the announced size; statistics
    or scores of products that a platform rounds to bfloat16 by default."""
    precisions = {}

    def noting(name):
        call = getattr(job_module, name)

        def noted(*arguments, **options):
            precisions[name] = jax.config.jax_default_matmul_precision
            return call(*arguments, **options)

        return noted

    for name in ("compress", "evaluate"):
        monkeypatch.setattr(job_module, name, noting(name))
    grid = SymmetricGrid(bits=4, group=32)
    job = Compress(
        model=SavedModel(path=saved["moe"]),
        recipe=(Quantize(grid=grid),),
        text=TEXT,
        calibration=CALIBRATION,
    )
    job.run(folder)
    assert precisions == {"compress": "float32", "evaluate": "float32"}
    arm = StudyResult.load(folder.results_path).arm("compressed")
    assert stored_bytes(folder.model) == arm.stored_bytes
    named = parameters(load_model(folder.model))
    original = parameters(load_model(saved["moe"]))
    for name, weight in named.items():
        if ".moe.experts." in name:
            assert isinstance(weight, Packed) and weight.bits == 4
            again = grid(original[name])
            same = jax.tree.map(lambda a, b: bool((a == b).all()), weight, again)
            assert all(jax.tree.leaves(same))
        else:
            np.testing.assert_array_equal(weight, original[name])


def test_text_and_calibration_share_no_document():
    """Catches calibration on the text that is evaluated."""
    for group in TEXT.corpus.groups:
        one, other = set(TEXT.documents(group)), set(CALIBRATION.documents(group))
        assert one and other and not one & other


class TwoDocuments:
    """Two documents of 250 bytes."""

    groups = ("g",)
    fingerprint = "two documents"

    def documents(self, group, split):
        for name in "ab":
            yield "\n".join(f"{name}{line:03d}" for line in range(50))


@pytest.mark.xdist_group("study")
def test_a_document_cut_for_the_text_is_not_calibrated_on_whole(saved, folder):
    """Catches a document that is told from itself because one side has but its first lines."""
    text = Text(corpus=TwoDocuments(), bytes_per_group=400, window=32)
    rest = Text(corpus=TwoDocuments(), bytes_per_group=240, skip_bytes=252, window=32)
    assert not set(text.documents("g")) & set(rest.documents("g"))
    recipe = (Quantize(grid=SymmetricGrid(bits=4, group=32)),)
    arm = Arm(name="x", model=SavedModel(path=saved["moe"]), recipe=recipe)
    with pytest.raises(ConfigError, match="1 documents of g"):
        Study(arms=(arm,), text=text, calibration=rest).run(folder)


def test_arms_must_have_names_and_bases_that_exist(saved):
    """Catches a typo in a base that would silently leave an arm unpaired."""
    model = SavedModel(path=saved["moe"])
    with pytest.raises(SpecError, match="Arm.base = 'bse'"):
        Study(
            arms=(Arm(name="base", model=model), Arm(name="x", model=model, base="bse")),
            text=TEXT,
            calibration=CALIBRATION,
        )
    with pytest.raises(SpecError, match="Arm.name"):
        Study(arms=(Arm(name="a", model=model),) * 2, text=TEXT, calibration=CALIBRATION)


def test_a_model_that_is_not_there_is_named():
    """Catches a bare FileNotFoundError for a typo in a shipped model's name."""
    with pytest.raises(CheckpointError, match="refernce"):
        SavedModel(path="refernce").manifest()


def test_plan_refuses_what_the_run_would_refuse(saved):
    """Catches a plan that promises what cannot run: a pattern that names nothing."""
    recipe = (Quantize(grid=SymmetricGrid(bits=4, group=32), parameters="layers.*.mlp.*"),)
    arm = Arm(name="x", model=SavedModel(path=saved["moe"]), recipe=recipe)
    with pytest.raises(SpecError, match="names no parameter"):
        Study(arms=(arm,), text=TEXT, calibration=CALIBRATION).plan()
