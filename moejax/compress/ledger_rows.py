"""Ledger rows: what a pass did to every matrix, with what is known of every expert."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moejax import weights
from moejax.calibrate import ExpertCounts, GateMass, LayerStatistics
from moejax.compress.accounting import stored_bytes, stored_code_bits
from moejax.compress.block_weights import block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight
from moejax.compress.slots import stored_sums
from moejax.models import Block, LayerSpec
from moejax.moe import MoESpec
from moejax.runs import LedgerRow
from moejax.runs.ledger import MERGED


@dataclass
class Lineage:
    """The stored experts of a layer as passes go over it.

    experts: the number that each has in the first model. past: number -> what became of it so far.
    """

    experts: list[int]
    past: dict[int, tuple[str, ...]]

    @staticmethod
    def of(layer: LayerSpec) -> Lineage:
        """Before any pass."""
        stored = layer.ffn.stored if isinstance(layer.ffn, MoESpec) else 0
        return Lineage(list(range(stored)), {})

    def went(self, edit: LayerEdit) -> None:
        """Takes in what a pass did to the layer."""
        for expert, head in enumerate(edit.merged_into or ()):
            number, into = self.experts[expert], self.experts[head]
            if number != into:
                self._add(number, f"{MERGED} into {into}")
                self._add(into, f"{MERGED} with {number}")
        for matrix in edit.matrices:
            if matrix.expert is not None and matrix.lineage:
                number = self.experts[matrix.expert]
                done = self.past.get(number, ())
                self.past[number] = done + tuple(x for x in matrix.lineage if x not in done)
        if edit.experts is not None:
            self.experts = [self.experts[e] for e in edit.experts]

    def _add(self, number: int, entry: str) -> None:
        self.past[number] = (*self.past.get(number, ()), entry)


class Rows:
    """Rows of one pass and layer. dtype: in which plain arrays are saved; tokens: of the text."""

    def __init__(
        self, arm: str, name: str, dtype: Any, layer: int, tokens: int, found: LayerStatistics
    ):
        self.arm, self.name, self.dtype = arm, name, dtype
        self.layer, self.tokens, self.found = layer, tokens, found

    def of_layer(self, before: Block, edit: LayerEdit, lineage: Lineage) -> list[LedgerRow]:
        """lineage: of the experts before the edit, which it takes in."""
        experts = list(lineage.experts)
        lineage.went(edit)
        if isinstance(before.spec.ffn, MoESpec):
            self.found = _of_stored(before, self.found)
        after = block_weights(edit.block)
        places = range(len(experts)) if edit.experts is None else edit.experts
        place = {expert: i for i, expert in enumerate(places)}
        rows = []
        for matrix in edit.matrices:
            if matrix.expert is None:
                rows.append(self.of_matrix(matrix, None, after.get(matrix.matrix)))
                continue
            kept = matrix.expert in place
            bank = after[matrix.matrix] if kept else None
            weight = None if bank is None else weights.take(bank, place[matrix.expert])
            number = experts[matrix.expert]
            whole = dataclasses.replace(matrix, lineage=lineage.past.get(number, ()))
            row = self.of_matrix(whole, number, weight)
            if isinstance(bank, weights.Format) and bank.common:
                # What experts share is counted once, with the first of them.
                own = (row.stored_bytes or 0) - bank.common_nbytes * (place[matrix.expert] > 0)
                bits = stored_code_bits(bank, self.dtype)
                row = dataclasses.replace(row, stored_bytes=own, code_bits=bits)
            rows.append(row)
        return rows

    def of_matrix(self, edit: MatrixEdit, number: int | None, weight: Weight | None) -> LedgerRow:
        """weight: of this expert alone, after the pass; None where it is gone."""
        tokens, mass = self._seen(edit.expert)
        return LedgerRow(
            arm=self.arm,
            pass_name=self.name,
            layer=self.layer,
            expert=number,
            matrix=edit.matrix,
            tokens=tokens,
            gate_mass=mass,
            code_bits=None if weight is None else stored_code_bits(weight, self.dtype),
            stored_bytes=0 if weight is None else stored_bytes(weight, self.dtype),
            relative_error=edit.relative_error,
            output_error=edit.output_error,
            nearest_error=edit.nearest_error,
            fallback=edit.fallback,
            dead=tokens == 0,
            calibrated=bool(tokens) and edit.calibrated,
            lineage=edit.lineage,
        )

    def _seen(self, expert: int | None) -> tuple[int | None, float | None]:
        """Tokens and gate mass, where they are known."""
        if expert is None:
            return self.tokens, None
        if ExpertCounts.name not in self.found:
            return None, None
        counts, mass = self.found[ExpertCounts.name], self.found[GateMass.name]
        return int(counts[expert]), float(mass[expert])


def _of_stored(block: Block, found: LayerStatistics) -> LayerStatistics:
    """Counts and masses of stored experts, where they can be known from those of the router's."""
    sums = {
        name: stored_sums(block, found[name])
        for name in (ExpertCounts.name, GateMass.name)
        if name in found
    }
    return {name: values for name, values in sums.items() if values is not None}
