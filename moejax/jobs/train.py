"""The job that trains a model from scratch, evaluates it and saves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx

from moejax import weights
from moejax.checkpoint import (
    Manifest,
    TrainCheckpoints,
    load_model,
    on_host,
    save_model,
    stored_bytes,
)
from moejax.core import SpecError, check_that, processes, spec
from moejax.data import (
    Batches,
    Corpus,
    Tokenizer,
    TokenStore,
    tokenize_corpus,
    write_folder_tokenizer,
)
from moejax.evaluate import Scores, evaluate, specialisation
from moejax.jobs.on_mesh import OnMesh
from moejax.jobs.plan import Plan, model_table
from moejax.models import (
    DecoderLM,
    ModelSpec,
    Remat,
    Structure,
    combine,
    count_parameters,
    flops_per_token,
    parameters,
    place,
    retyped,
    with_parameters,
)
from moejax.moe import Parallel, RouterLoss
from moejax.runs import (
    ArmResult,
    Metrics,
    NoMetrics,
    RunFolder,
    StudyResult,
    TensorBoard,
    Tracker,
    device_facts,
    progress,
)
from moejax.runs.metrics import BITS_PER_BYTE
from moejax.train import (
    AdamW,
    MeshBatches,
    Optimizer,
    Placement,
    Schedule,
    TrainState,
    start,
    start_on_mesh,
    train,
    train_step,
)
from moejax.train.validation import ValidationText, validation_text

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ARM = "trained"


@runtime_checkable
class TrackerSource(Protocol):
    """Begins to track a run: folder -> tracker."""

    def __call__(self, folder: RunFolder) -> Tracker: ...


@spec
class ToTensorBoard:
    """Scalars for TensorBoard in the run folder."""

    def __call__(self, folder: RunFolder) -> Tracker:
        return TensorBoard(folder)


@spec
class Train:
    """Trains `model` on text for `steps` steps of `batch` rows of `length` tokens.

    mixture: (group, share) pairs, None for equal shares. accumulate: micro-batches per step.
    compute_dtype: of activations and matrix products; parameters and optimizer are float32.
    save_dtype: of the saved model, whose scores on the valid split are the run's result.
    log_every, evaluate_every, checkpoint_every: in steps; 0 for at the end only.
    evaluate_bytes: text of the valid split per group. evaluators: further model -> {name: number};
    every process calls them, with the model where it lies.

    remat: what the backward pass computes again, None for nothing. on: the mesh to run on, None for
    one device. checkpoints: their folder, such as gs://bucket/run, where processes on several hosts
    share no disk; None for that in the run folder.

    A run folder that holds an unfinished run of the same config is resumed where it stopped. In
    several processes each reads its own rows of every batch, the first one writes the run folder,
    and each writes its part of the checkpoints into the same folder, which all must reach.
    """

    in_processes: ClassVar[bool] = True

    model: ModelSpec
    corpus: Corpus
    tokenizer: Tokenizer
    steps: int
    batch: int = 16
    length: int = 256
    mixture: tuple[tuple[str, float], ...] | None = None
    accumulate: int = 1
    optimizer: Optimizer = AdamW()
    losses: tuple[RouterLoss, ...] = ()
    compute_dtype: str = "float32"
    save_dtype: str = "bfloat16"
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_bytes: int = 65_536
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: int = 0
    trackers: tuple[TrackerSource, ...] = ()
    evaluators: tuple[Callable[[DecoderLM], Mapping[str, float]], ...] = ()
    remat: Remat | None = None
    on: OnMesh | None = None
    checkpoints: str | None = None

    def check(self) -> None:
        for field in ("steps", "batch", "length", "accumulate", "log_every", "keep_last"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        for field in ("seed", "evaluate_every", "checkpoint_every", "keep_best"):
            check_that(getattr(self, field) >= 0, self, field, "It must be at least 0.")
        check_that(
            self.batch % self.accumulate == 0,
            self,
            "accumulate",
            f"It must divide batch = {self.batch}.",
        )
        for field in ("compute_dtype", "save_dtype"):
            check_that(
                getattr(self, field) in DTYPES, self, field, f"Choose one of {', '.join(DTYPES)}."
            )
        check_that(self.evaluate_bytes >= 1, self, "evaluate_bytes", "Try 65536.")
        check_that(
            self.model.vocab == self.tokenizer.vocab,
            self,
            "model",
            f"Set its vocab to {self.tokenizer.vocab}, the size of the tokenizer.",
        )

    def plan(self) -> Plan:
        """Size of the model, tokens and arithmetic of the run, memory of its state."""
        counts, tokens = count_parameters(self.model), self.steps * self.batch * self.length
        forward = flops_per_token(self.model, self.length // 2)
        rows = (
            ("tokens", f"{tokens:,}"),
            ("forward and backward PFLOP", f"{3 * forward * tokens / 1e15:,.2f}"),
            ("parameters, gradients and AdamW state, MiB", f"{16 * counts.total / 2**20:,.1f}"),
        )
        tables = (
            model_table({"model": self.model}, self.length),
            ("Run", ("of the whole run", ""), rows),
        )
        return Plan(f"{self.steps} steps of {self.batch} x {self.length} tokens.", tables)

    def run(self, folder: RunFolder) -> None:
        """Trains, or resumes, in `folder`; leaves `model/` and `results.json` there."""
        began = time.monotonic()
        parallel = self._parallel()
        store = tokenize_corpus(self.corpus, self.tokenizer, "train")
        batches = self._batches(store, parallel)
        text = self._validation_text()
        structure, state, placement = self._start(parallel)
        step = train_step(
            structure,
            self.optimizer,
            self.steps,
            losses=self.losses,
            accumulate=self.accumulate,
            dtype=DTYPES[self.compute_dtype],
            seed=self.seed,
            remat=self.remat,
            placement=placement,
        )
        schedule = Schedule(self.steps, self.log_every, self.evaluate_every, self.checkpoint_every)
        with (
            self._metrics(folder) as metrics,
            TrainCheckpoints(
                self.checkpoints or folder.checkpoints, self.keep_last, self.keep_best
            ) as checkpoints,
        ):
            state = train(
                structure,
                state,
                step,
                batches,
                schedule,
                metrics=metrics,
                checkpoints=checkpoints,
                evaluators=(
                    lambda model: self._bits_per_byte(model, text, parallel),
                    *self.evaluators,
                ),
            )
        whole = on_host(combine(structure, state.trainable, state.frozen))
        manifest = self._save(folder, whole, batches)
        # What is scored is what was saved, read back.
        scores = self._scores(self._read_back(folder, whole, parallel), text, parallel)
        if manifest is None:  # another process writes
            return
        result = self._result(folder, manifest, scores, text, time.monotonic() - began)
        result.save(folder.results_path)
        domains = ", ".join(f"{d.group} {d.bits_per_byte:.3f}" for d in scores.domains)
        print(f"bits per byte on {self.evaluate_bytes} bytes per group (valid): {domains}")
        print(f"model: {folder.model}")

    def _parallel(self) -> Parallel | None:
        """The mesh. Several processes need one, over the devices of all of them."""
        if self.on is None and processes.count() > 1:
            raise SpecError(
                f"Train.on is None, but there are {processes.count()} processes.",
                "Give a mesh, such as Train.on = @OnMesh() with MeshSpec.data = -1.",
                field="on",
            )
        return None if self.on is None else self.on.build()

    def _batches(self, store: TokenStore, parallel: Parallel | None) -> Batches | MeshBatches:
        mixture = None if self.mixture is None else dict(self.mixture)

        def make(rows: Sequence[int] | None = None) -> Batches:
            return Batches(store, self.batch, self.length, mixture, self.seed, rows=rows)

        return make() if parallel is None else MeshBatches(make, self.batch, parallel)

    def _start(self, parallel: Parallel | None) -> tuple[Structure, TrainState, Placement | None]:
        if parallel is not None:
            return start_on_mesh(self.model, self.seed, self.optimizer, self.steps, parallel)
        model = DecoderLM(self.model, rngs=nnx.Rngs(self.seed))
        return *start(model, self.optimizer, self.steps), None

    def _metrics(self, folder: RunFolder) -> Metrics:
        if not folder.writes:
            return NoMetrics()
        return Metrics(folder, [source(folder) for source in self.trackers])

    def _save(
        self, folder: RunFolder, whole: DecoderLM, batches: Batches | MeshBatches
    ) -> Manifest | None:
        """The manifest of the saved model, where this process writes it."""

        def write() -> Manifest:
            write_folder_tokenizer(folder.model, self.tokenizer)
            return save_model(
                folder.model, whole, dtype=DTYPES[self.save_dtype], facts=self._facts(batches)
            )

        return processes.on_first(write)

    def _read_back(
        self, folder: RunFolder, whole: DecoderLM, parallel: Parallel | None
    ) -> DecoderLM:
        """The saved model, where it is scored; rounded as it was where not all reach the folder."""
        if processes.count() == 1:
            model = load_model(folder.model)
        else:
            saved = retyped(parameters(whole), DTYPES[self.save_dtype])
            model = with_parameters(whole.spec, retyped(saved, jnp.float32))
        return model if parallel is None else place(model, parallel.mesh, parallel.rules)

    def _validation_text(self) -> ValidationText:
        store = tokenize_corpus(self.corpus, self.tokenizer, "valid")
        return validation_text(store, self.tokenizer, self.evaluate_bytes, self.length, self.batch)

    def _scores(self, model: DecoderLM, text: ValidationText, parallel: Parallel | None) -> Scores:
        with progress(len(text.batches), "evaluate", "batches") as bar:
            found = evaluate(
                {ARM: model},
                text.batches,
                base={},
                group_bytes=text.group_bytes,
                dtype=DTYPES[self.compute_dtype],
                progress=bar,
                parallel=parallel,
            )
        return found[ARM]

    def _bits_per_byte(
        self, model: DecoderLM, text: ValidationText, parallel: Parallel | None
    ) -> dict[str, float]:
        scores = self._scores(model, text, parallel)
        parts = {f"{BITS_PER_BYTE}/{d.group}": d.bits_per_byte for d in scores.domains}
        return parts | {"perplexity": scores.average.perplexity}

    def _facts(self, batches: Batches | MeshBatches) -> dict[str, Any]:
        return {
            "job": "Train",
            "steps": self.steps,
            "tokens": self.steps * self.batch * self.length,
            "epochs": batches.epochs(),
            "corpus": self.corpus.fingerprint,
            "tokenizer": self.tokenizer.sha256,
            "seed": self.seed,
        }

    def _result(
        self,
        folder: RunFolder,
        manifest: Manifest,
        scores: Scores,
        text: ValidationText,
        seconds: float,
    ) -> StudyResult:
        saved = {n: weights.abstract_from_meta(meta) for n, meta in manifest.formats.items()}
        experts = [w for name, w in saved.items() if ".experts." in name]
        bits = 8.0 * jnp.dtype(DTYPES[self.save_dtype]).itemsize
        arm = ArmResult(
            name=ARM,
            base=None,
            passes=(),
            code_bits=bits,
            bits_per_weight=bits,
            stored_bytes=stored_bytes(folder.model),
            expert_bytes=sum(map(weights.nbytes, experts)),
            parameters=count_parameters(self.model).total,
            domains=scores.domains,
            average=scores.average,
            seconds=seconds,
        )
        protocol = {
            "text": f"{type(self.corpus).__name__}, split valid",
            "bytes_per_group": dict(text.group_bytes),
            "window": self.length,
            "tokenizer": self.tokenizer.sha256,
            "model": manifest.sha256,
            "seeds": [self.seed],
            "dtype": self.compute_dtype,
            "device": device_facts(),
        }
        return StudyResult(protocol, (arm,), specialisation=specialisation(scores))
