"""Compression studies: arms under one protocol, measured in one pass over the text."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moejax.calibrate import Calibration
from moejax.checkpoint import payload_bytes, save_model
from moejax.compress import Step, account, check_recipe, compress, touched
from moejax.core import ConfigError, check_that, spec
from moejax.data import Corpus, Tokenizer, shipped_tokenizer, write_folder_tokenizer
from moejax.evaluate import Scores, evaluate, specialisation
from moejax.files import cache_root, content_hash
from moejax.jobs.expectations import Expectation
from moejax.jobs.model_source import ModelSource
from moejax.jobs.plan import Plan, plan_arms
from moejax.jobs.recover import texts
from moejax.jobs.text import Text
from moejax.models import DecoderLM, parameters, retyped, with_parameters
from moejax.report import build_report, print_summary
from moejax.runs import ArmResult, Ledger, RunFolder, StudyResult, progress
from moejax.trace import TraceRecorder, TraceWriter, layout_of

STORED = jnp.bfloat16  # of plain arrays in saved models, and so in every count of bytes


@spec
class Arm:
    """A model and what is done to it. base: the arm it is compared with, None for none."""

    name: str
    model: ModelSource
    recipe: tuple[Step, ...] = ()
    base: str | None = None


@spec
class Study:
    """Arms side by side: perplexity, KL and agreement on `text`, paired with each arm's base.

    calibration: the text that statistics are collected on; no document of it may be in `text`.
    traces: arms whose routing of every token of `text` is recorded, each in traces/ARM.
    priming: training text that xz reads first, in a second baseline. Weights are rounded to
    bfloat16, in which they are stored, before anything is measured. The first arm's routing is
    drawn. remarks: what the report says below its expectations, why one may fail for instance.
    """

    arms: tuple[Arm, ...]
    text: Text
    calibration: Text
    expectations: tuple[Expectation, ...] = ()
    remarks: tuple[str, ...] = ()
    priming: Corpus | None = None
    traces: tuple[str, ...] = ()
    seed: int = 0
    title: str = ""

    def check(self) -> None:
        check_that(len(self.arms) > 0, self, "arms", "Give at least one arm.")
        names = [arm.name for arm in self.arms]
        for arm in self.arms:
            check_that(names.count(arm.name) == 1, arm, "name", "Another arm has this name.")
            check_that(
                arm.base is None or (arm.base in names and arm.base != arm.name),
                arm,
                "base",
                f"The arms are {', '.join(names)}.",
            )
        check_that(
            set(self.traces) <= set(names), self, "traces", f"The arms are {', '.join(names)}."
        )
        for name in self.traces:
            check_that(
                Path(name).name == name and not name.startswith("."),
                self,
                "traces",
                "A traced arm names a folder: give it a name without slashes or a leading dot.",
            )
        for expectation in self.expectations:
            for field in ("arm", "than", "controls"):
                named = getattr(expectation, field, ())
                known = {named} if isinstance(named, str) else set(named)
                check_that(
                    known <= set(names), expectation, field, f"The arms are {', '.join(names)}."
                )

    def plan(self) -> Plan:
        return plan_arms(self.arms, self.text.window)

    def run(self, folder: RunFolder) -> None:
        run_study(folder, self)


@spec
class Compress:
    """One recipe on one model: measured against the model it starts from, and saved as model/."""

    model: ModelSource
    recipe: tuple[Step, ...]
    text: Text
    calibration: Text
    name: str = "compressed"
    seed: int = 0

    def _study(self) -> Study:
        base = Arm(name="base", model=self.model)
        arm = Arm(name=self.name, model=self.model, recipe=self.recipe, base="base")
        return Study(arms=(base, arm), text=self.text, calibration=self.calibration, seed=self.seed)

    def plan(self) -> Plan:
        return self._study().plan()

    def run(self, folder: RunFolder) -> None:
        made = run_study(folder, self._study())[self.name]
        tokenizer = self.model.tokenizer()
        facts = {
            "made_by": folder.facts["config_sha256"],
            "from": self.model.path,
            "tokenizer": tokenizer.sha256,
        }
        save_model(folder.model, made, dtype=STORED, facts=facts)
        if tokenizer.sha256 != shipped_tokenizer().sha256:
            write_folder_tokenizer(folder.model, tokenizer)


def run_study(folder: RunFolder, study: Study) -> dict[str, DecoderLM]:
    """Makes and measures every arm, writes ledger, results and report; returns the models."""
    sources = dict.fromkeys(arm.model for arm in study.arms)
    tokenizer = _common_tokenizer(list(sources))
    loaded = {source: source.load(STORED) for source in sources}
    for arm in study.arms:
        check_recipe(arm.recipe, loaded[arm.model])
    if any(arm.recipe for arm in study.arms):
        _check_apart(study.text, study.calibration)
    for text in dict.fromkeys(text for arm in study.arms for text in texts(arm.recipe)):
        _check_apart(study.text, text)
    batches, group_bytes = study.text.batches(tokenizer)
    statistics = Calibration(
        study.calibration.batches(tokenizer)[0], cache=cache_root() / "statistics"
    )
    ledger = Ledger()
    key = jax.random.key(study.seed)
    models: dict[str, DecoderLM] = {}
    seconds: dict[str, float] = {}
    for number, arm in enumerate(progress(study.arms, "compress", "arms")):
        began = time.perf_counter()
        with precise_products():
            made = compress(
                loaded[arm.model],
                arm.recipe,
                statistics,
                key=key,
                arm=arm.name,
                ledger=ledger,
                folder=folder.path / "stages" / str(number),
            )
        models[arm.name] = _as_saved(made)
        seconds[arm.name] = time.perf_counter() - began
    ledger.save(folder.ledger_path)
    bases = {arm.name: arm.base for arm in study.arms}
    shutil.rmtree(folder.traces, ignore_errors=True)  # of a run that was cut off: read anew
    with (
        progress(len(batches) * len(models), "evaluate", "batches") as bar,
        precise_products(),
        ExitStack() as recording,
    ):
        recorders = {
            arm.name: recording.enter_context(
                _recorder(folder, arm, models[arm.name], tuple(group_bytes))
            )
            for arm in study.arms
            if arm.name in study.traces
        }
        scores = evaluate(
            models,
            batches,
            base=bases,
            group_bytes=group_bytes,
            progress=bar,
            record=recorders,
        )
    result = StudyResult(
        protocol=_protocol(study, group_bytes, tokenizer),
        arms=tuple(
            _result(arm, models[arm.name], scores[arm.name], ledger, seconds[arm.name])
            for arm in study.arms
        ),
        baselines=_baselines(study),
        remarks=study.remarks,
        specialisation=specialisation(scores[study.arms[0].name]),
    )
    result.save(folder.results_path)
    if study.expectations:
        verdicts = tuple(expect(result, ledger) for expect in study.expectations)
        result = dataclasses.replace(result, verdicts=verdicts)
        result.save(folder.results_path)
    print_summary(result, report=build_report(folder))
    return models


def _recorder(
    folder: RunFolder, arm: Arm, model: DecoderLM, groups: tuple[str, ...]
) -> TraceRecorder:
    sha256 = arm.model.manifest().sha256
    if arm.recipe:
        sha256 = content_hash([sha256, *map(describe, arm.recipe)])
    layout = layout_of(model, sha256, groups)
    return TraceRecorder(TraceWriter(folder.traces / arm.name, layout))


def _as_saved(model: DecoderLM) -> DecoderLM:
    """Plain weights that a pass made anew, rounded to what will be stored."""
    rounded = retyped(parameters(model), STORED)
    return with_parameters(model.spec, retyped(rounded, jnp.float32))


def precise_products() -> AbstractContextManager[Any]:
    """Products of float32 activations in float32, on platforms too whose default is less."""
    return jax.default_matmul_precision("float32")


def _common_tokenizer(sources: Sequence[ModelSource]) -> Tokenizer:
    """The tokenizer of all models; ConfigError if they differ, or one was trained with another."""
    first = sources[0].tokenizer()
    for source in sources:
        trained = source.manifest().facts.get("tokenizer")
        for sha256 in (source.tokenizer().sha256, trained):
            if sha256 is not None and sha256 != first.sha256:
                raise ConfigError(
                    f"{source.path} has the tokenizer {sha256[:12]}, {sources[0].path} is read "
                    f"with {first.sha256[:12]}.",
                    "Compare models of one tokenizer in one study.",
                )
    return first


def _check_apart(text: Text, calibration: Text) -> None:
    """ConfigError if a document, or part of one, is evaluated and also calibrated or trained on."""
    sources = [(used.corpus.fingerprint, used.split) for used in (text, calibration)]
    for group in sorted(set(text.corpus.groups) & set(calibration.corpus.groups)):
        both = len(set(text.documents(group)) & set(calibration.documents(group)))
        if sources[0] == sources[1]:  # the last document of a text may be cut, and so look new
            both = len(set(text.span(group)) & set(calibration.span(group)))
        if both:
            raise ConfigError(
                f"{both} documents of {group} are in Study.text and in the text that a recipe "
                "calibrates or trains on.",
                "Take another split, or skip_bytes past the evaluated text.",
            )


def _result(
    arm: Arm, model: DecoderLM, scores: Scores, ledger: Ledger, seconds: float
) -> ArmResult:
    books = account(model, touched(ledger, arm.name), STORED)
    return ArmResult(
        name=arm.name,
        base=arm.base,
        passes=tuple(describe(step) for step in arm.recipe),
        code_bits=books.code_bits,
        bits_per_weight=books.bits_per_weight,
        stored_bytes=payload_bytes(model, STORED),
        expert_bytes=books.expert_bytes,
        parameters=books.parameters,
        domains=scores.domains,
        average=scores.average,
        seconds=seconds + scores.seconds,
    )


def describe(value: Any) -> str:
    """A spec in one line, fields at their defaults left out: Quantize(grid=...)."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = [
        f"{field.name}={describe(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(fields)})"


def _baselines(study: Study) -> dict[str, dict[str, float]]:
    with progress(1 + (study.priming is not None), "xz -9e", "baselines") as bar:
        found = {"xz -9e": study.text.xz()}
        bar.advance(1)
        if study.priming is not None:
            found["xz -9e after 10 MB of training text"] = study.text.xz(study.priming)
    return found


def _protocol(study: Study, group_bytes: dict[str, int], tokenizer: Tokenizer) -> dict[str, Any]:
    device = jax.devices()[0]
    calibrated = study.calibration
    return {
        "study": study.title or "untitled",
        "text": f"{type(study.text.corpus).__name__}, split {study.text.split}",
        "text fingerprint": study.text.corpus.fingerprint,
        "bytes per group": group_bytes,
        "window": study.text.windowing,
        "calibration": (
            f"{type(calibrated.corpus).__name__}, split {calibrated.split}, "
            f"{calibrated.bytes_per_group} bytes per group after the first "
            f"{calibrated.skip_bytes}; no document of it is evaluated"
        ),
        "tokenizer": tokenizer.sha256,
        "models": {arm.model.path: arm.model.manifest().sha256 for arm in study.arms},
        "seed": study.seed,
        "activations": "float32",
        "plain weights stored as": "bfloat16",
        "device": f"{device.platform}, {device.device_kind}",
        "standard errors": "paired by token, evaluation windows as clusters",
    }
