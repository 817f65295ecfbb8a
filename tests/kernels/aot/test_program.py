"""Programs as they run: loops counted, collectives by mesh axis, flops and bytes by part."""

import numpy as np
import pytest
from moejax_kernels import aot
from moejax_kernels.aot.program import arrays
from moejax_kernels.aot.traffic import device_groups, mesh_axes

SCANNED = """HloModule scanned, is_scheduled=true

%step (p.1: f32[4,8]) -> f32[4,4] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%p.1, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}, \
metadata={op_name="a/attention/dot"}
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %fusion.1 = f32[4,4]{1,0} fusion(%x), kind=kOutput, calls=%step
  %reduced = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%next, %reduced)
}

%condition (s: (s32[], f32[4,8])) -> pred[] {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stop = s32[] constant(STOP)
  ROOT %less = pred[] compare(%i, %stop), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(START)
  %begin = (s32[], f32[4,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[4,8]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def scanned(start=0, stop=6):
    return aot.parse_program(SCANNED.replace("START", str(start)).replace("STOP", str(stop)))


@pytest.mark.parametrize(("start", "stop", "trips"), [(0, 6, 6), (2, 6, 4), (0, 0, 0)])
def test_trips_of_a_loop(start, stop, trips):
    """Fails where a body counts once, as in XLA's totals, or a loop's start is ignored."""
    program = scanned(start, stop)
    assert program.runs["body"] == trips
    assert program.unknown_loops == ()
    work = aot.work_by_part(program, lambda scope: "attention" if "attention" in scope else "rest")
    assert work.get("attention", aot.Work()).flops == trips * 2 * 4 * 4 * 8


def test_a_loop_of_unknown_length_is_named():
    """Fails where a loop whose bound is data silently counts as some number of trips."""
    text = SCANNED.replace("constant(STOP)", "custom-call()").replace("START", "0")
    assert aot.parse_program(text).unknown_loops == ("loop",)


def test_transfers_weigh_loops_and_group_sizes():
    """Fails where an all-reduce costs its size once, where loops count once, or on a wrong axis."""
    (found,) = aot.transfers(scanned(), (("data", 2), ("expert", 2)))
    assert (found.kind, found.axes, found.devices) == ("all-reduce", "expert", 2)
    assert found.total == 6 * 2 * (4 * 8 * 4) / 2


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_way_hlo_writes_them(written, groups):
    """Fails where a transposed iota, or a part of an axis, is read as neighbouring devices."""
    assert device_groups(written, 4) == groups


def test_axes_of_groups():
    """Fails where axes are taken from group sizes: two axes of one size look alike then."""
    mesh = (("data", 4), ("fsdp", 1), ("expert", 4))
    ids = np.arange(16).reshape(4, 4)
    assert mesh_axes(ids.tolist(), mesh) == "expert"
    assert mesh_axes(ids.T.tolist(), mesh) == "data"
    assert mesh_axes([ids.ravel().tolist()], mesh) == "data+expert"


def test_arrays_of_a_shape():
    """Fails where bfloat16 is not 16 bits, or on-chip memory counts as HBM."""
    first, second = arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0})")
    assert (first.bytes, first.space) == (12, 1)
    assert (second.bytes, second.space) == (3, 0)


def test_batched_products_as_convolutions():
    """Fails where a batch axis, which TPUs write as a dilated window, multiplies the flops."""
    text = """HloModule m

ENTRY %main (x: f32[16,8,4], y: f32[16,4,32]) -> f32[16,8,32] {
  %x = f32[16,8,4]{2,1,0} parameter(0)
  %y = f32[16,4,32]{2,1,0} parameter(1)
  ROOT %c = f32[16,8,32]{2,1,0} convolution(%x, %y), window={size=16 stride=15 lhs_dilate=16}, \
dim_labels=0bf_0io->0bf
}
"""
    work = aot.work_by_part(aot.parse_program(text), lambda scope: "all")
    assert work["all"].flops == 2 * 16 * 8 * 4 * 32


def test_a_slice_of_stacked_layers_moves_one_layer():
    """Fails where a fusion that slices one layer out of a stack is charged for the whole stack."""
    text = """HloModule m

%inner (p: f32[6,64], i: s32[]) -> f32[1,64] {
  %p = f32[6,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,64]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,64}
}

%outer (q: f32[6,64], j: s32[]) -> f32[1,64] {
  %q = f32[6,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %f = f32[1,64]{1,0} fusion(%q, %j), kind=kLoop, calls=%inner
  ROOT %n = f32[1,64]{1,0} negate(%f)
}

ENTRY %main (x: f32[6,64], k: s32[]) -> f32[1,64] {
  %x = f32[6,64]{1,0} parameter(0)
  %k = s32[] parameter(1)
  ROOT %g = f32[1,64]{1,0} fusion(%x, %k), kind=kLoop, calls=%outer
}
"""
    work = aot.work_by_part(aot.parse_program(text), lambda scope: "all")
    assert work["all"].hbm_bytes == 2 * 64 * 4 + 4


@pytest.mark.parametrize(
    ("name", "devices", "hbm"),
    [
        ("v5e:16x16", 256, 16e9),
        ("v5p:8x8x8", 512, 95e9),
        ("tpu7x:2x2x1", 8, 96e9),
        ("h100x8", 8, 80e9),
    ],
)
def test_topologies(name, devices, hbm):
    """Fails where a v5p chip counts as two devices, or a tpu7x chip as one."""
    pod = aot.parse_topology(name)
    assert (pod.devices, pod.hbm) == (devices, hbm)


@pytest.mark.parametrize("name", ["v5p:8x8", "v9:2x2", "v5e", "h100", "v5e:0x4"])
def test_unknown_topologies(name):
    """Fails where a name goes to the compiler unread, whose words help nobody."""
    with pytest.raises(ValueError, match=r"topology .* (is unknown|has \d dimensions)"):
        aot.parse_topology(name)


def test_memory_wanted():
    """Fails where GiB of the compiler's words are read as 10^9 bytes, or any refusal as memory."""
    words = "RESOURCE_EXHAUSTED: ... Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert aot.memory_wanted(words) == 20.5 * 2**30
    assert aot.memory_wanted("INTERNAL: something else") is None
