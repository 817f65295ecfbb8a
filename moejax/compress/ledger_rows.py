"""Ledger rows: what a pass did to every matrix, with what is known of every expert."""

from __future__ import annotations

from typing import Any

from moejax import weights
from moejax.calibrate import ExpertCounts, GateMass, LayerStatistics
from moejax.compress.accounting import stored_bytes, stored_code_bits
from moejax.compress.block_weights import block_weights
from moejax.compress.passes import LayerEdit, MatrixEdit, Weight
from moejax.models import Block, LayerSpec
from moejax.moe import MoESpec
from moejax.runs import LedgerRow


class Rows:
    """Rows of one pass and layer. dtype: in which plain arrays are saved; tokens: of the text."""

    def __init__(
        self, arm: str, name: str, dtype: Any, layer: int, tokens: int, found: LayerStatistics
    ):
        self.arm, self.name, self.dtype = arm, name, dtype
        self.layer, self.tokens, self.found = layer, tokens, found

    def of_layer(self, before: Block, edit: LayerEdit, experts: list[int]) -> list[LedgerRow]:
        """experts: the number in the first model of each expert before the edit."""
        if _behind_slots(before):
            # Statistics number the router's experts, the ledger the stored ones.
            self.found = {}
        after = block_weights(edit.block)
        places = range(len(experts)) if edit.experts is None else edit.experts
        place = {expert: i for i, expert in enumerate(places)}
        rows = []
        for matrix in edit.matrices:
            if matrix.expert is None:
                rows.append(self.of_matrix(matrix, None, after.get(matrix.matrix)))
                continue
            kept = matrix.expert in place
            weight = weights.take(after[matrix.matrix], place[matrix.expert]) if kept else None
            rows.append(self.of_matrix(matrix, experts[matrix.expert], weight))
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


def _behind_slots(block: Block) -> bool:
    ffn = block.spec.ffn
    return isinstance(ffn, MoESpec) and ffn.slots is not None


def numbered(layer: LayerSpec) -> list[int]:
    """The stored experts of a layer before any pass."""
    return list(range(layer.ffn.stored)) if isinstance(layer.ffn, MoESpec) else []
