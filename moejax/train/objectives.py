"""What a step minimises: next-token loss, and what a student learns from a teacher.

An objective sees a forward pass of the student and, where it `teaches`, one of the teacher on the
same tokens. Objectives add up with weights, each for a part of the run: `Together`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.core import SpecError, check_that, compat, spec, taps
from moejax.core.taps import NOTHING, Request
from moejax.models import DecoderLM, Encoding, ModelSpec, project
from moejax.models.block import run_length
from moejax.moe import MoESpec
from moejax.train.divergences import Divergence, ForwardKL
from moejax.train.objective import CHUNK, chunks, cross_entropy, output_table


@dataclasses.dataclass(frozen=True)
class Passed:
    """A model and its forward pass on a batch.

    chunk: tokens whose logits exist at a time on a device. parts: into how many equal parts, each
    on devices of its own, the tokens are cut.
    """

    model: DecoderLM
    encoding: Encoding
    chunk: int = CHUNK
    parts: int = 1

    @property
    def hidden_TxD(self) -> Array:
        return self.encoding.hidden_BxSxD.reshape(-1, self.encoding.hidden_BxSxD.shape[-1])


@runtime_checkable
class Objective(Protocol):
    """A scalar to minimise, float32.

    request: the taps it reads. teaches: whether it asks a teacher.
    """

    @property
    def request(self) -> Request: ...

    @property
    def teaches(self) -> bool: ...

    def objection(self, student: ModelSpec, teacher: ModelSpec | None) -> str | None:
        """What to mend where these models cannot be trained so; None where they can."""
        ...

    def __call__(
        self, student: Passed, teacher: Passed | None, target_T: Array, step: Array
    ) -> Array:
        """target_T: the token after each. step: int32, counted from 0."""
        ...


@spec
class CrossEntropy:
    """Mean nats per next token, without logits in memory where they are plain products."""

    request = NOTHING
    teaches = False

    def objection(self, student: ModelSpec, teacher: ModelSpec | None) -> str | None:
        return None

    def __call__(
        self, student: Passed, teacher: Passed | None, target_T: Array, step: Array
    ) -> Array:
        if _plain_logits(student.model.spec):
            table_VxD = output_table(student.model, student.encoding.hidden_BxSxD.dtype)
            loss = cross_entropy(
                student.hidden_TxD, table_VxD, target_T, student.chunk, student.parts
            )
            return jnp.asarray(loss)

        def nll(hidden_CxD: Array, target_Cx1: Array) -> Array:
            log_p = jax.nn.log_softmax(project(student.model, hidden_CxD), axis=-1)
            return -jnp.take_along_axis(log_p, target_Cx1.astype(jnp.int32), axis=-1)[:, 0]

        return _mean_of_chunks(nll, student, student.hidden_TxD, target_T[:, None])


@spec
class FromLogits:
    """temperature^2 * divergence(teacher, student) of next-token distributions, mean over tokens.

    Both softened by `temperature` (arXiv:1503.02531: the square keeps gradients of one size).
    """

    divergence: Divergence = ForwardKL()
    temperature: float = 1.0
    request = NOTHING
    teaches = True

    def check(self) -> None:
        check_that(self.temperature > 0, self, "temperature", "1 for the models as they are.")

    def objection(self, student: ModelSpec, teacher: ModelSpec | None) -> str | None:
        if teacher is not None and student.vocab != teacher.vocab:
            return f"The vocabularies are {student.vocab} and {teacher.vocab}: share one tokenizer."
        return None

    def __call__(
        self, student: Passed, teacher: Passed | None, target_T: Array, step: Array
    ) -> Array:
        assert teacher is not None

        def apart(ours_CxD: Array, theirs_CxD: Array) -> Array:
            ours = project(student.model, ours_CxD) / self.temperature
            theirs = project(teacher.model, theirs_CxD) / self.temperature
            return self.divergence(jax.lax.stop_gradient(theirs), ours)

        mean = _mean_of_chunks(apart, student, student.hidden_TxD, teacher.hidden_TxD)
        return self.temperature**2 * mean


@spec
class FromHidden:
    """Mean squared difference of what layers give, mean over layers.

    of: "block_output", the residual stream after each layer, or "ffn_output", what the feed-forward
    adds (layer-wise distillation of MoE layers into dense ones). Student and teacher have as many
    layers of one width.
    """

    of: str = taps.BLOCK_OUTPUT
    teaches = True

    def check(self) -> None:
        known = (taps.BLOCK_OUTPUT, taps.FFN_OUTPUT)
        check_that(self.of in known, self, "of", f"Choose one of {', '.join(known)}.")

    @property
    def request(self) -> Request:
        return frozenset({self.of})

    def objection(self, student: ModelSpec, teacher: ModelSpec | None) -> str | None:
        if teacher is None:
            return None
        shapes = [(len(m.layers), m.width) for m in (student, teacher)]
        if shapes[0] != shapes[1]:
            return (
                f"Layers and widths are {shapes[0]} and {shapes[1]}: FromHidden compares layer by "
                "layer; use FromLogits."
            )
        return None

    def __call__(
        self, student: Passed, teacher: Passed | None, target_T: Array, step: Array
    ) -> Array:
        assert teacher is not None
        pairs = zip(student.encoding.taps, teacher.encoding.taps, strict=True)
        losses = [_mse(a[self.of], b[self.of]) for a, b in pairs if self.of in a and self.of in b]
        return jnp.mean(jnp.stack(losses))


@spec
class FromExperts:
    """Mean squared difference of what every expert makes of every token, mean over MoE layers.

    Expert by expert of the router's: through its slot map where a student's are merged. The two
    have as many router experts in every layer.
    """

    request = frozenset({taps.ALL_OUTPUT})
    teaches = True

    def objection(self, student: ModelSpec, teacher: ModelSpec | None) -> str | None:
        if teacher is None:
            return None
        ours, theirs = _experts(student), _experts(teacher)
        if ours != theirs or not any(ours):
            return (
                f"Router experts per layer are {ours} and {theirs}: FromExperts compares expert by "
                "expert; use FromHidden or FromLogits."
            )
        return None

    def __call__(
        self, student: Passed, teacher: Passed | None, target_T: Array, step: Array
    ) -> Array:
        assert teacher is not None
        ours, theirs = _router_outputs(student), _router_outputs(teacher)
        losses = [_mse(a, b) for a, b in zip(ours, theirs, strict=True)]
        return jnp.mean(jnp.stack(losses))


@spec
class Term:
    """weight * objective in steps `start` to before `end`; None for to the end of the run.

    A teacher's term that ends early is the staged distillation of MoS (arXiv:2201.05596).
    """

    objective: Objective
    weight: float = 1.0
    start: int = 0
    end: int | None = None

    def check(self) -> None:
        check_that(self.weight > 0, self, "weight", "Leave out a term that counts nothing.")
        check_that(self.start >= 0, self, "start", "Steps count from 0.")
        late = self.end is None or self.end > self.start
        check_that(late, self, "end", f"Give a step after start = {self.start}, or None.")


@spec
class Together:
    """The sum of terms, each weighed and for its part of the run."""

    terms: tuple[Term, ...]

    def check(self) -> None:
        check_that(len(self.terms) > 0, self, "terms", "Give at least one.")

    @property
    def request(self) -> Request:
        return frozenset().union(*(term.objective.request for term in self.terms))

    @property
    def teaches(self) -> bool:
        return any(term.objective.teaches for term in self.terms)

    def objection(self, student: ModelSpec, teacher: ModelSpec | None) -> str | None:
        found = (term.objective.objection(student, teacher) for term in self.terms)
        return next((reason for reason in found if reason is not None), None)

    def __call__(
        self, student: Passed, teacher: Passed | None, target_T: Array, step: Array
    ) -> Array:
        total = jnp.float32(0)
        for term in self.terms:
            value = term.objective(student, teacher, target_T, step)
            on = step >= term.start
            if term.end is not None:
                on &= step < term.end
            total += term.weight * jnp.where(on, value, 0)
        return total


def check_objective(objective: Objective, student: ModelSpec, teacher: ModelSpec | None) -> None:
    """Raises SpecError where an objective cannot compare these models."""
    if objective.teaches and teacher is None:
        raise SpecError(
            f"{objective} asks a teacher, and there is none.", "Give one, or train on text alone."
        )
    if reason := objective.objection(student, teacher):
        raise SpecError(f"{type(objective).__name__} cannot compare student and teacher.", reason)


def _mse(ours: Array, theirs: Array) -> Array:
    theirs = jax.lax.stop_gradient(theirs).astype(jnp.float32)
    return jnp.mean(jnp.square(ours.astype(jnp.float32) - theirs.reshape(ours.shape)))


def _experts(model: ModelSpec) -> tuple[int, ...]:
    return tuple(m.ffn.experts if isinstance(m.ffn, MoESpec) else 0 for m in model.layers)


def _router_outputs(passed: Passed) -> list[Array]:
    """[E, T, D] of each MoE layer, by router expert: its first copy."""
    outputs: list[Array] = []
    first = 0
    for run in passed.model.runs:
        slots = None if run.moe is None else run.moe.slots
        slot_LxExM = None if slots is None else compat.read(slots["slot"])
        for index in range(run_length(run)):
            tapped = passed.encoding.taps[first + index]
            if taps.ALL_OUTPUT in tapped:
                y_SxTxD = tapped[taps.ALL_OUTPUT]
                outputs.append(y_SxTxD if slot_LxExM is None else y_SxTxD[slot_LxExM[index, :, 0]])
        first += run_length(run)
    return outputs


def _plain_logits(model: ModelSpec) -> bool:
    """Whether logits are hidden states times a matrix and nothing else."""
    return not model.head_bias and model.logits_multiplier == 1 and model.logits_soft_cap is None


def _mean_of_chunks(function: Callable[..., Array], passed: Passed, *arrays: Array) -> Array:
    """The mean of function(*rows) [C] over all rows of arrays [T, ...].

    A chunk at a time, and again for the gradient, so that no logits are kept.
    """
    *rows, weight_CxT = chunks(passed.chunk, passed.parts, *arrays)
    summed = jax.checkpoint(lambda rows, weight_C: jnp.sum(function(*rows) * weight_C))

    def add(total: Array, part: tuple) -> tuple[Array, None]:
        return total + summed(*part), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (tuple(rows), weight_CxT))
    return total / len(arrays[0])
