"""Real compilations for TPUs without one: one child process per chip, shared by all tests."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moejax_kernels import aot

from tests.kernels.aot.programs import BRANCHING, MATMUL, matmul, shape

needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="libtpu is not installed (extra: aot)"
)
MESH = AbstractMesh((16, 16), ("data", "expert"))


@partial(jax.shard_map, mesh=MESH, in_specs=(P("data"), P("expert")), out_specs=P("data"))
def exchange(x_TxD, w_ExDxF):
    w_ExDxF = jax.lax.all_gather(w_ExDxF, "expert", axis=0, tiled=True)
    y_TxF = jnp.einsum("td,edf->tf", x_TxD, w_ExDxF)
    y_16xtxF = jax.lax.all_to_all(y_TxF.reshape(16, -1, y_TxF.shape[1]), "expert", 0, 0)
    return jax.lax.psum(y_16xtxF, "expert").reshape(-1, y_TxF.shape[1])


def sharded(*dims, spec):
    sharding = NamedSharding(MESH, spec)
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=sharding)


@pytest.fixture(scope="module")
def on_v5e():
    megablox = partial(gmm, preferred_element_type=jnp.bfloat16, tiling=(128, 512, 512))
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)
    half = jnp.bfloat16
    programs = {
        "matmul": MATMUL,
        "branching": BRANCHING,
        "megablox": aot.Program(
            megablox,
            (
                shape(512, 1024, dtype=half),
                shape(8, 1024, 512, dtype=half),
                shape(8, dtype=jnp.int32),
            ),
        ),
        "donated": aot.Program(donated, (shape(256, 128),)),
        "wrong": aot.Program(matmul, (shape(128, 128, dtype=jnp.int32),) * 2),
        "sharded": aot.Program(
            exchange,
            (sharded(4096, 512, spec=P("data")), sharded(32, 512, 256, spec=P("expert"))),
            (16, 16),
        ),
    }
    return aot.compile_all(programs, chip="v5e", topology="v5e:16x16", keep_failures=True)


@needs_libtpu
def test_a_matmul_takes_the_cycles_of_its_units(on_v5e):
    """Catches a schedule of another op, and useful cycles not those of four 128 x 128 units."""
    schedule = on_v5e["matmul"].kernel("matmul")
    cost = aot.cost(schedule, hbm_bytes=0, flops=2 * 128 * 512 * 512)
    assert cost.useful_cycles == 512 <= cost.cycles < 1.2 * 512
    assert schedule.matmul.sum() == 512


@needs_libtpu
def test_megablox_is_counted_by_group_sizes(on_v5e):
    """Catches a grid whose steps come from data read as constant, and tiles counted once in all."""
    kernel = on_v5e["megablox"].kernel("gmm")
    few, many = (kernel.cycles(kernel.grid(steps)) for steps in (8, 16))
    tile = aot.cost(kernel, kernel.grid(8), hbm_bytes=0, flops=8 * 2 * 128 * 512 * 512)
    assert few < many < 2 * few and tile.useful_cycles == 8 * 512
    tiles = [r for r in kernel.root.walk() if kernel.matmul[kernel.own(r)].sum() == 512]
    assert len(tiles) == 2  # the last tile of K masks and stores, the others add


@needs_libtpu
def test_recorded_dumps_are_of_this_format(on_v5e):
    """Catches a compiler whose labels or branches the recordings no longer show."""
    kernel = on_v5e["branching"].kernel("branching")
    assert [region.trips for region in kernel.root.walk() if region.is_loop] == [8, None, 5]


@needs_libtpu
def test_memory_knows_donation(on_v5e):
    """Catches a program carried to the child without its donated arguments."""
    memory = on_v5e["donated"].memory
    assert memory["arguments"] == memory["aliased"] == 256 * 128 * 4


@needs_libtpu
def test_a_failure_brings_the_compilers_text(on_v5e):
    """Catches a failure that ends the other programs of the child, or loses its reason."""
    assert isinstance(on_v5e["wrong"], aot.CompileError)
    assert "wrong does not compile for v5e" in str(on_v5e["wrong"])
    assert "float acc with int lhs" in str(on_v5e["wrong"])


@needs_libtpu
def test_collectives_of_a_pod(on_v5e):
    """Catches bytes of the operand instead of the result, and groups of the wrong mesh axis."""
    found = {one.kind: one for one in on_v5e["sharded"].collectives}
    assert set(found) == {"all-gather", "all-to-all", "all-reduce"}
    assert found["all-gather"].bytes == 32 * 512 * 256 * 2
    assert found["all-to-all"].bytes == 256 * 256 * 2
    assert found["all-gather"].groups.count("{") == 17  # 16 rows of 16 chips
    assert "all-to-all" in on_v5e["sharded"].table()


@needs_libtpu
def test_largest_topology():
    """Catches meshes of three axes laid out as if the topology were flat."""
    mesh = AbstractMesh((8, 8, 8), ("a", "b", "c"))

    def cut(*dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    report = aot.compile_for(
        lambda x, w: (x @ w).sum(0),
        cut(4096, 512, spec=P("a", ("b", "c"))),
        cut(512, 512, spec=P(("b", "c"))),
        chip="v5p",
        topology="v5p:8x8x8",
        mesh=(8, 8, 8),
        schedules=False,
    )
    assert {one.kind for one in report.collectives} == {"all-reduce"}
    assert report.memory["arguments"] == (512 * 8 + 8 * 512) * 2


def test_missing_compiler_is_named(monkeypatch):
    """Catches a traceback of the child where a package has to be installed."""
    monkeypatch.setattr("moejax_kernels.aot.compile.find_spec", lambda name: None)
    with pytest.raises(aot.CompilerMissing, match="libtpu"):
        aot.compile_for(lambda x: x, shape(8, 128))
    with pytest.raises(aot.CompilerMissing, match="cuda13"):
        aot.compile_for(lambda x: x, shape(8, 128), chip="h100")


@pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None, reason="jax[cuda13] is not installed (extra: gpu)"
)
def test_h100():
    """Catches a GPU program compiled for the CPU of this machine."""
    half = shape(1024, 1024, dtype=jnp.bfloat16)
    report = aot.compile_for(lambda x, w: x @ w, half, half, chip="h100")
    assert "gemm" in report.hlo and report.memory["outputs"] == 2 * 1024**2


@needs_libtpu
def test_a_kernel_that_does_not_lower_is_named():
    """Catches a batch that ends at the first program JAX itself refuses."""
    programs = {
        "wrong": aot.Program(lambda x: x @ x, (shape(8, 128),)),
        "right": aot.Program(lambda x: x + 1, (shape(8, 128),)),
    }
    found = aot.compile_all(programs, chip="v5e", schedules=False, keep_failures=True)
    assert "wrong does not lower for v5e" in str(found["wrong"])
    assert found["right"].memory["outputs"] == 8 * 128 * 4
