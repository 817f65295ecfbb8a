"""Recovery: training as a step of a recipe, on text or from the model that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moejax.checkpoint import TrainCheckpoints
from moejax.compress import Step
from moejax.compress.patterns import matching
from moejax.core import DataError, SpecError, check_that, spec
from moejax.data import Batch, Tokenizer, shipped_tokenizer
from moejax.jobs.text import Text
from moejax.models import (
    DecoderLM,
    ModelSpec,
    combine,
    parameters,
    partition,
    with_parameters,
)
from moejax.models.partition import Leaves
from moejax.moe import RouterLoss
from moejax.runs import Metrics
from moejax.train import (
    AdamW,
    CrossEntropy,
    Everything,
    Objective,
    OnPolicy,
    Optimizer,
    Schedule,
    Trains,
    check_objective,
    start,
    straight_through,
    train,
    train_step,
)
from moejax.weights import Format, Grid, materialize


@spec
class StraightThrough:
    """Matrices that train as floats, are seen on `grid` in every step, and end on it.

    parameters: a glob over canonical names, the same matrices in every layer. Matrices that are
    codes already begin at the values these stand for.
    """

    grid: Grid
    parameters: str = "layers.*.moe.experts.*"

    def names(self, model: ModelSpec) -> tuple[str, ...]:
        """The canonical names it means."""
        return matching("StraightThrough.parameters", self.parameters, model)

    def applies(self, model: ModelSpec, leaf: str) -> bool:
        """Whether it means a leaf of `models.partition`: `runs.0.moe.experts.up`."""
        inner = leaf.split(".", 2)[-1]
        return any(name.split(".", 2)[-1] == inner for name in self.names(model))


@spec
class Recover:
    """`steps` steps of training on `text`: fine-tuning, or distillation from the arm's own model.

    objective: what is minimised; one that `teaches` is taught by the model that the recipe began
    with. trains: which leaves; codes of any format stay frozen, unless `through` trains what they
    are rounded from. on_policy: texts that the model writes itself. tokenizer: None for the one
    that ships. Rows are drawn in an order of `seed`, epoch after epoch; rows that documents do not
    fill are left out. A router's balancing bias moves as in any training, whatever `trains` says.
    """

    text: Text
    steps: int
    batch: int = 8
    objective: Objective = CrossEntropy()
    trains: Trains = Everything()
    optimizer: Optimizer = AdamW(peak_learning_rate=3e-4, warmup=0, weight_decay=0.0)
    losses: tuple[RouterLoss, ...] = ()
    on_policy: OnPolicy | None = None
    through: StraightThrough | None = None
    tokenizer: Tokenizer | None = None
    seed: int = 0

    def check(self) -> None:
        for field in ("steps", "batch"):
            check_that(getattr(self, field) >= 1, self, field, "It must be at least 1.")
        check_that(self.seed >= 0, self, "seed", "Give 0, 1, 2, ...")
        if self.on_policy is not None:
            short = self.on_policy.prompt < self.text.window
            check_that(short, self, "on_policy", f"Prompts must be below {self.text.window}.")

    def outline(self, model: DecoderLM) -> tuple[DecoderLM, tuple[str, ...]]:
        opened = self._opened(model)
        _, trainable, _ = partition(opened, self.trains)
        if not trainable:
            raise SpecError(
                f"Recover.trains = {self.trains} finds nothing to train in this model.",
                "Choose other leaves, or add adapters before this step.",
                field="trains",
            )
        # What the optimizer asks of a run and its leaves.
        jax.eval_shape(self.optimizer.transformation(self.steps).init, trainable)
        vocab = self._tokenizer().vocab
        fix = f"It has {vocab} tokens, the model {model.spec.vocab}: give the model's own."
        check_that(vocab == model.spec.vocab, self, "tokenizer", fix)
        return self._closed(opened, model), tuple(sorted(trainable))

    def compares(self, model: ModelSpec, original: ModelSpec) -> None:
        check_objective(self.objective, model, original)

    def run(self, model: DecoderLM, original: DecoderLM, folder: Path) -> DecoderLM:
        # The step donates what it trains; the arm's own model must stay.
        graphdef, state = nnx.split(self._opened(model))
        mine = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state))
        structure, begun = start(mine, self.optimizer, self.steps, self.trains)

        def through(leaves: Leaves) -> Leaves:
            return self._through(model.spec, leaves)

        step = train_step(
            structure,
            self.optimizer,
            self.steps,
            losses=self.losses,
            seed=self.seed,
            objective=self.objective,
            teacher=original if self.objective.teaches else None,
            through=through,
        )
        if self.on_policy is not None:
            step = self.on_policy(structure, step, through)
        rows = Rows(self.text, self._tokenizer(), self.batch, self.seed)
        with (
            Metrics(folder) as metrics,
            TrainCheckpoints(folder / "checkpoints", 1, 0) as checkpoints,
        ):
            ended = train(
                structure,
                begun,
                step,
                rows,
                Schedule(self.steps),
                metrics=metrics,
                checkpoints=checkpoints,
            )
        return self._closed(combine(structure, ended.trainable, ended.frozen), model)

    def _tokenizer(self) -> Tokenizer:
        return shipped_tokenizer() if self.tokenizer is None else self.tokenizer

    def _opened(self, model: DecoderLM) -> DecoderLM:
        """The model with floats where it trains through codes."""
        if self.through is None:
            return model
        named = parameters(model)
        for name in self.through.names(model.spec):
            named[name] = _evaluated(materialize, named[name])
        return with_parameters(model.spec, named)

    def _closed(self, model: DecoderLM, before: DecoderLM) -> DecoderLM:
        """The model with codes there again."""
        if self.through is None:
            return model
        named = parameters(model)
        for name in self.through.names(before.spec):
            grid = self.through.grid
            named[name] = _evaluated(lambda w, n=name, g=grid: g(w, n), named[name])
        return with_parameters(before.spec, named)

    def _through(self, model: ModelSpec, leaves: Leaves) -> Leaves:
        through = self.through
        if through is None:
            return leaves
        return straight_through(leaves, through.grid, lambda name: through.applies(model, name))


class Rows:
    """Endless batches of the full windows of a text, in a seeded order per epoch."""

    def __init__(self, text: Text, tokenizer: Tokenizer, batch: int, seed: int):
        found = [
            np.concatenate([part.tokens_BxS[:, :1], part.targets_BxS], axis=1)[part.mask_BxS.all(1)]
            for part in text.batches(tokenizer)[0]
        ]
        self._rows = np.concatenate(found).astype(np.int32)
        if len(self._rows) < batch:
            raise DataError(
                f"the text to recover on has {len(self._rows)} full windows of {text.window} "
                f"tokens, too few for a batch of {batch}.",
                "Give more bytes_per_group, a shorter window, or a smaller batch.",
            )
        self._batch, self._seed, self._taken = batch, seed, 0

    def __next__(self) -> Batch:
        per_epoch = len(self._rows) // self._batch
        epoch, place = divmod(self._taken, per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
        chosen = order[place * self._batch :][: self._batch]
        self._taken += 1
        return Batch(self._rows[chosen], np.zeros(self._batch, np.int32))

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._taken = int(state["taken"])


def texts(recipe: tuple[Step, ...]) -> list[Text]:
    """The texts that the recoveries of a recipe train on."""
    return [step.text for step in recipe if isinstance(step, Recover)]


def _evaluated(function: Any, w: Array | Format) -> Any:
    """function(w), of shapes where w is one."""
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(w))
    return jax.eval_shape(function, w) if shapes else function(w)
