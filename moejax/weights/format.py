"""What a weight is: the base of all formats, their registry, and functions on any weight."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from moejax_kernels.grouped_matmul import grouped_matmul as dense_grouped_matmul
from moejax_kernels.grouped_matmul import grouped_matmul_of

from moejax.core.errors import SpecError

FORMATS: dict[str, type[Format]] = {}
C = TypeVar("C", bound=type)


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """A matrix, or a stack of matrices [*lead, K, N], stored in some other way than as one array.

    A subclass is a frozen dataclass under `@register_format`. Its fields named in `meta_fields`
    are JSON-ready facts that no stacking, slicing or sharding changes; the other fields are
    leaves: arrays, other weights, tuples of weights, or None. Shapes come from the leaves, all of
    which share the leading axes; a scan may stack more in front.
    Leaves may be tracers or ShapeDtypeStructs: building one checks nothing, `check()` does.
    """

    meta_fields: ClassVar[tuple[str, ...]] = ()
    trainable: ClassVar[tuple[str, ...]] = ()  # leaf fields that an optimizer may change
    common: ClassVar[tuple[str, ...]] = ()  # array fields that all experts share, 1 for their axis

    @abc.abstractmethod
    def materialize(self, dtype: Any = jnp.float32) -> Array:
        """The weight as one array [*lead, K, N]."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(*lead, K, N) of the weight it stands for."""

    @property
    @abc.abstractmethod
    def code_bits(self) -> float:
        """Bits of one weight's code, scales and zeros not counted."""

    @abc.abstractmethod
    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        """Leaf name (as in `flatten`) -> logical axis names, given those of [*lead, K, N]."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises SpecError if leaves and meta fields do not fit; works on shapes alone."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves: the payload on disk."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / number of weights: codes, scales, zeros and factors."""
        return 8 * self.nbytes / math.prod(self.shape)

    @property
    def common_nbytes(self) -> int:
        """Bytes of what all experts share; `take` of one expert holds them too."""
        leaves = [getattr(self, name) for name in self.common]
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    def grouped_matmul(
        self, x_RxK: Array, group_sizes_G: Array, *, group_offset: int | Array = 0
    ) -> Array:
        """[R, N]: rows sorted by group times their expert; each expert is decoded once.

        Wants exactly one leading axis, the experts; see moejax_kernels.grouped_matmul.
        """
        require_experts(self)
        return grouped_matmul_of(
            x_RxK,
            self,
            _decode,
            group_sizes_G,
            columns=self.shape[-1],
            group_offset=group_offset,
        )

    def matmul(self, x: Array) -> Array:
        """[..., N]: x [..., K] times this single matrix, in x's dtype."""
        return matmul(x, self.materialize(jnp.promote_types(x.dtype, jnp.float32)))

    def take(self, index: int | Array) -> Any:
        """The part under `index` of the leading axis; an int removes the axis."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    @classmethod
    def concatenate(cls, weights: Sequence[Any]) -> Any:
        """Weights of this class and equal meta fields, joined along the leading axis."""
        if len({jax.tree.structure(weight) for weight in weights}) > 1:
            kinds = sorted({str(jax.tree.structure(weight)) for weight in weights})
            raise SpecError(
                f"concatenate got unlike {cls.__name__} weights: {'; '.join(kinds)}.",
                "Put experts of different precision in Buckets.",
            )
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *weights)


Weight = Array | Format


def register_format(cls: C) -> C:
    """Class decorator above @dataclass(frozen=True): makes a Format a pytree named on disk."""
    names = [field.name for field in dataclasses.fields(cls)]
    jax.tree_util.register_dataclass(
        cls,
        data_fields=[name for name in names if name not in cls.meta_fields],
        meta_fields=list(cls.meta_fields),
    )
    known = FORMATS.setdefault(cls.__name__, cls)
    if known is not cls and known.__module__ != cls.__module__:
        modules = f"{known.__module__} and {cls.__module__}"
        raise TypeError(f"two formats are named {cls.__name__}: {modules}")
    FORMATS[cls.__name__] = cls
    return cls


def materialize(w: Weight, dtype: Any = jnp.float32) -> Array:
    """The weight as one array [*lead, K, N] of `dtype`."""
    return w.materialize(dtype) if isinstance(w, Format) else jnp.asarray(w, dtype)


def grouped_matmul(
    x_RxK: Array, w: Weight, group_sizes_G: Array, *, group_offset: int | Array = 0
) -> Array:
    """[R, N]: rows sorted by group, each times the expert group(r) - group_offset of w [E, K, N].

    Rows of groups that w does not hold, and rows beyond sum(group_sizes), are zero.
    """
    if isinstance(w, Format):
        return w.grouped_matmul(x_RxK, group_sizes_G, group_offset=group_offset)
    return dense_grouped_matmul(x_RxK, w, group_sizes_G, group_offset=group_offset)


def matmul(x: Array, w: Weight) -> Array:
    """[..., N]: x [..., K] times one matrix, accumulated in float32, in x's dtype."""
    if len(w.shape) != 2:
        raise SpecError(
            f"matmul got a weight of shape {tuple(w.shape)}.",
            "Give one matrix [K, N]; for a stack of experts use grouped_matmul.",
        )
    if isinstance(w, Format):
        return w.matmul(x)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, w, preferred_element_type=accumulate).astype(x.dtype)


def nbytes(w: Weight) -> int:
    """Bytes of all leaves: the payload on disk. Works on ShapeDtypeStructs."""
    return w.nbytes if isinstance(w, Format) else math.prod(w.shape) * w.dtype.itemsize


def shape(w: Weight) -> tuple[int, ...]:
    """(*lead, K, N) of the weight it stands for."""
    return tuple(w.shape)


def code_bits(w: Weight) -> float:
    """Bits of one weight's code without scales; 8 * itemsize for an array."""
    return w.code_bits if isinstance(w, Format) else 8 * w.dtype.itemsize


def bits_per_weight(w: Weight) -> float:
    """8 * nbytes / number of weights."""
    return 8 * nbytes(w) / math.prod(w.shape)


def take(w: Weight, index: int | Array) -> Weight:
    """The part under `index` of the leading axis; an int removes the axis."""
    return w.take(index) if isinstance(w, Format) else w[index]


def concatenate(weights: Sequence[Weight]) -> Weight:
    """Weights of one format, joined along the leading axis.

    Raises SpecError when formats or their meta fields differ: such experts go into `Buckets`.
    """
    if not weights:
        raise SpecError("concatenate got no weights.", "Give at least one.")
    formats = [w for w in weights if isinstance(w, Format)]
    if not formats:
        return jnp.concatenate([w for w in weights if not isinstance(w, Format)])
    if len(formats) < len(weights) or len({type(w) for w in formats}) > 1:
        names = ", ".join(sorted({type(w).__name__ for w in weights}))
        raise SpecError(f"concatenate got weights of {names}.", "Put different formats in Buckets.")
    return formats[0].concatenate(formats)


def logical_axes(w: Weight, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
    """Leaf name (as in `flatten`) -> logical axis names, given those of [*lead, K, N]."""
    if len(logical) != len(w.shape):
        raise SpecError(
            f"{len(logical)} axis names {tuple(logical)} for a weight of shape {tuple(w.shape)}.",
            "Give one name, or None, per axis.",
        )
    return w.axes(logical) if isinstance(w, Format) else {"": tuple(logical)}


def relative_error(original: Weight, compressed: Weight) -> Array:
    """||original - compressed|| / ||original|| (Frobenius) of each matrix: float32, shape `lead`.

    An all-zero original gives 0 if the other is all zero too, else infinity.
    """
    exact, near = materialize(original), materialize(compressed)
    if exact.shape != near.shape:
        raise SpecError(
            f"relative_error got shapes {exact.shape} and {near.shape}.",
            "Compare a weight with its own compressed form.",
        )
    # Scaled by the largest entry so that squares neither underflow nor overflow.
    largest = jnp.abs(exact).max((-2, -1), keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(exact / unit, axis=(-2, -1))
    error = jnp.linalg.norm((exact - near) / unit, axis=(-2, -1))
    without = jnp.where((near == exact).all((-2, -1)), 0.0, jnp.inf)
    return jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), without)


def require_experts(w: Format) -> None:
    """Raises SpecError unless `w` is [E, K, N]."""
    if len(w.shape) != 3:
        raise SpecError(
            f"grouped_matmul got a {type(w).__name__} of shape {tuple(w.shape)}.",
            "It wants one leading axis, the experts: take() a layer first, or scan over layers.",
        )


def require(condition: bool, owner: Format, what: str, fix: str) -> None:
    """Raises SpecError naming the format unless `condition` holds."""
    if not condition:
        raise SpecError(f"{type(owner).__name__}: {what}.", fix)


def _decode(one: Format) -> Array:
    return one.materialize(jnp.float32)
