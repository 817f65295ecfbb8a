"""Collectives read from lines as the compilers write them."""

from __future__ import annotations

import pytest
from moejax_kernels.aot import hlo

LINES = {
    "%all-gather.4 = bf16[32,512]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, "
    "replica_groups={{0,1},{2,3}}, dimensions={0}": ("all-gather", 32768, "{{0,1},{2,3}}"),
    "ROOT %r = f32[8]{0} all-reduce(%x), replica_groups=[8,64]<=[512], to_apply=%add": (
        "all-reduce",
        32,
        "[8,64]<=[512]",
    ),
    "%s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, u32[], u32[]) all-gather-start(%x), "
    "replica_groups=[2,4]<=[4,2]T(1,0)": ("all-gather", 256, "[2,4]<=[4,2]T(1,0)"),
    "%p = s8[100]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}": (
        "collective-permute",
        100,
        "{{0,1},{1,0}}",
    ),
    "%t = (f32[4]{0}, f32[4]{0}) all-to-all(%a, %b), replica_groups={}": ("all-to-all", 32, "{}"),
    "%v = s4[7]{0} ragged-all-to-all(%a, %b, %c, %d, %e, %f), replica_groups={{0,1}}": (
        "ragged-all-to-all",
        4,
        "{{0,1}}",
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_lines(line):
    """Catches operands counted as results, 4-bit numbers counted as bytes, groups cut short."""
    (found,) = hlo.collectives("ENTRY %main {\n  " + line + "\n}")
    assert found[1:] == LINES[line]


def test_ends_and_names_are_no_collectives():
    """Catches the done half of a pair counted again, and fusions named after collectives."""
    text = "%d = f32[8] all-gather-done(%s)\n%all-reduce.1 = f32[8] fusion(%x), calls=%all-reduce"
    assert hlo.collectives(text) == ()


def test_table_sums_by_kind_and_groups():
    """Catches ops of different groups added up."""
    text = hlo.table(hlo.collectives("\n".join(["  " + line for line in LINES] * 2)))
    assert text.count("all-gather") == 2 and " 2 " in text
