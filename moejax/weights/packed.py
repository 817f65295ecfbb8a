"""Packed integers: the bit layout and the format of uniform grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from moejax_kernels import quantized_grouped_matmul as kernels

from moejax.core.errors import SpecError
from moejax.weights.format import Format, register_format, require, require_experts

WORD = 32


def pack_codes(codes: Array, bits: int) -> Array:
    """uint32 words [*lead, K * bits / 32, N] of codes [*lead, K, N] in [0, 2**bits).

    Laid out as `moejax_kernels.quantized_grouped_matmul.layout` says: where `bits` divides 8, the
    codes of a column follow each other along K without gaps, the first in the lowest bits. Higher
    bits of a code are cut off.
    Raises SpecError if `bits` is not 1 .. 8 or K * bits is no multiple of 32.
    """
    check_packable(codes.shape[-2], bits)
    return kernels.pack_codes(codes, bits)


def unpack_codes(words: Array, bits: int, inputs: int) -> Array:
    """uint8 codes [*lead, inputs, N] of words [*lead, inputs * bits / 32, N]: undoes pack_codes."""
    check_packable(inputs, bits)
    return kernels.unpack_codes(words, bits)


def check_packable(inputs: int, bits: int, name: str = "") -> None:
    """Raises SpecError, naming the matrix, unless K codes of `bits` bits fill whole words."""
    of = f" of {name}" if name else ""
    if not 1 <= bits <= 8:
        raise SpecError(f"bits = {bits}{of} cannot be packed.", "Choose 1 to 8.", field="bits")
    if inputs * bits % WORD:
        per = kernels.layout(bits).inputs
        raise SpecError(
            f"{inputs} inputs{of} at {bits} bits fill no whole number of 32-bit words.",
            f"Choose other bits, or a width that is a multiple of {per}.",
            field="bits",
        )


def check_group(inputs: int, group: int, name: str = "") -> None:
    """Raises SpecError, naming the matrix, unless groups of `group` inputs divide K."""
    if group < 1 or inputs % group:
        of = f" of {name}" if name else ""
        raise SpecError(
            f"group = {group} does not divide the {inputs} inputs{of}.",
            "Choose a divisor, or group = None for one scale per column.",
            field="group",
        )


@register_format
@dataclass(frozen=True)
class Packed(Format):
    """Integers of `bits` bits with one scale, and perhaps one zero, per group of `group` inputs.

    w[e, k, n] = (code[e, k, n] - zero[e, k // group, n]) * scale[e, k // group, n]

    words: uint32 [*lead, K * bits / 32, N], laid out as `pack_codes` says.
    scale: float16 (or any float) [*lead, K / group, N].
    zero: uint8 or float [*lead, K / group, N]; None means 2**(bits - 1), the symmetric grid.
    Built and checked by `pack(...)`.
    """

    words: Array
    scale: Array
    zero: Array | None
    bits: int
    group: int

    meta_fields: ClassVar[tuple[str, ...]] = ("bits", "group")
    trainable: ClassVar[tuple[str, ...]] = ("scale",)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, words, columns = self.words.shape
        return (*lead, words * WORD // self.bits, columns)

    @property
    def code_bits(self) -> float:
        return self.bits

    def materialize(self, dtype: Any = jnp.float32) -> Array:
        codes = unpack_codes(self.words, self.bits, self.shape[-2]).astype(jnp.float32)
        zero = float(2 ** (self.bits - 1)) if self.zero is None else grouped(self.zero, 1)
        w = (grouped(codes, self.group) - zero) * grouped(self.scale, 1)
        return w.reshape(self.shape).astype(dtype)

    def grouped_matmul(
        self,
        x_RxK: Array,
        group_sizes_G: Array,
        *,
        group_offset: int | Array = 0,
        addend: tuple[Array, Array] | None = None,
    ) -> Array:
        """[R, N], multiplied as it is packed; addend: low-rank factors (u, v) of a further term."""
        require_experts(self)
        return kernels.quantized_grouped_matmul(
            x_RxK,
            self.words,
            self.scale,
            self.zero,
            group_sizes_G,
            bits=self.bits,
            group_offset=group_offset,
            addend=addend,
        )

    def axes(self, logical: Sequence[str | None]) -> dict[str, tuple[str | None, ...]]:
        names = ("words", "scale") if self.zero is None else ("words", "scale", "zero")
        return {name: tuple(logical) for name in names}

    def check(self) -> None:
        check_coded(self, self.words, self.scale, self.bits, self.group)
        if self.zero is not None:
            require(
                tuple(self.zero.shape) == tuple(self.scale.shape),
                self,
                f"zero has shape {tuple(self.zero.shape)}, scale {tuple(self.scale.shape)}",
                "Give one zero per scale, or None for a symmetric grid.",
            )
            require(
                self.zero.dtype == jnp.uint8 or jnp.issubdtype(self.zero.dtype, jnp.floating),
                self,
                f"zero is {self.zero.dtype}",
                "Store it as uint8 or float16.",
            )


def pack(codes: Array, scale: Array, zero: Array | None, bits: int, group: int) -> Packed:
    """Packed weight of codes [*lead, K, N] and scale, zero [*lead, K / group, N]; jit-able.

    Codes are integers in [0, 2**bits); this is the caller's duty, tracers cannot be looked at.
    Raises SpecError if bits is not 1 .. 8, K * bits no multiple of 32, group no divisor of K, or
    scale or zero has another shape or an unfit dtype.
    """
    check_packable(codes.shape[-2], bits)
    check_group(codes.shape[-2], group)
    packed = Packed(pack_codes(codes, bits), scale, zero, bits, group)
    packed.check()
    return packed


def grouped(values: Array, group: int) -> Array:
    """float32 [*lead, G, group, N] of [*lead, G * group, N]; group = 1 adds a broadcast axis."""
    *lead, inputs, columns = values.shape
    return values.astype(jnp.float32).reshape(*lead, inputs // group, group, columns)


def check_coded(owner: Format, words: Array, scale: Array, bits: int, group: int) -> None:
    """What every format of words and group scales must obey."""
    require(1 <= bits <= 8, owner, f"bits = {bits}", "Choose 1 to 8.")
    require(words.dtype == jnp.uint32, owner, f"words are {words.dtype}", "Use pack_codes.")
    *lead, count, columns = words.shape
    whole = count % kernels.layout(bits).words == 0
    require(whole, owner, f"{count} words hold no whole codes of {bits} bits", "Use pack_codes.")
    inputs = count * WORD // bits
    fits = group >= 1 and inputs % group == 0
    require(fits, owner, f"group = {group} does not divide {inputs} inputs", "Choose a divisor.")
    wanted = (*lead, inputs // group, columns)
    require(
        tuple(scale.shape) == wanted,
        owner,
        f"scale has shape {tuple(scale.shape)}, expected {wanted}",
        "Give one scale per group and column.",
    )
    floating = jnp.issubdtype(scale.dtype, jnp.floating)
    require(floating, owner, f"scale is {scale.dtype}", "Store it as float16 or float32.")
