"""Schedules read from recorded dumps: no compiler is needed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from moejax_kernels import aot
from moejax_kernels.aot.control import read_regions
from moejax_kernels.chips import CHIPS, V5E, V6E

from tests.kernels.aot.programs import DUMPS

pytestmark = pytest.mark.parametrize("chip", CHIPS.values(), ids=list(CHIPS))


@cache
def recorded(chip):
    bundles, utilization = (DUMPS / f"{chip.name}.txt").read_text().split("==\n", 1)
    return aot.parse(bundles, utilization, chip)


def paths(chip):
    """Paths of the recorded kernel below the guard that v5p puts around it for its second core."""
    return {
        path.removeprefix("if0/") if chip.cores == 2 and chip.branch_delay == 4 else path: path
        for path in recorded(chip).regions
    }


def test_regions_nest_as_the_kernel_is_written(chip):
    """Catches loops taken for guards, guards cut off at a nested one, and siblings put inside."""
    expected = [
        "loop0",  # the grid
        "loop0/if0",  # its body
        "loop0/if0/if0",  # first step: zeros
        "loop0/if0/if1",  # whether the loop of unknown length has a trip at all
        "loop0/if0/if1/loop0",
        "loop0/if0/if1/loop0/if0",
        "loop0/if0/loop0",  # five products
        "loop0/if0/if2",
    ]
    assert [path for path in paths(chip) if path.startswith("loop0")] == expected


def test_constant_trips_and_the_grid(chip):
    """Catches a trip count off by one, and a pipeline whose fill and drain count as steps."""
    schedule, at = recorded(chip), paths(chip)
    unknown = at["loop0/if0/if1/loop0"]
    runs = schedule.executions({unknown: 6 * 8})
    assert schedule.regions[unknown].trips is None
    assert schedule.grid(6) == {at["loop0"]: 8} and runs[at["loop0"]] == 8
    assert runs[at["loop0/if0"]] == 6 and runs[at["loop0/if0/loop0"]] == 30
    assert runs[at["loop0/if0/if1/loop0/if0"]] == 48
    with pytest.raises(ValueError, match="depend on data"):
        schedule.cycles()
    with pytest.raises(ValueError, match="No regions"):
        schedule.cycles({"loop7": 1})


def test_cycles_are_bundles_times_executions(chip):
    """Catches bundles counted twice, in a region and in its parent, and empty ones left out."""
    schedule, at = recorded(chip), paths(chip)
    counts = {at["loop0/if0/if1/loop0"]: 48, at["loop0/if0/if0"]: 2}
    runs = schedule.executions(counts)
    masks = np.array([schedule.own(region) for region in schedule.root.walk()])
    np.testing.assert_array_equal(masks.sum(0), 1)
    total = sum(int(schedule.own(schedule.regions[path]).sum()) * n for path, n in runs.items())
    assert schedule.bundles(counts) == total == schedule.cycles(counts)
    more = schedule.bundles(counts | {at["loop0/if0/if0"]: 3})
    assert more - total == schedule.own(schedule.regions[at["loop0/if0/if0"]]).sum()


def test_matrix_unit_work_is_known(chip):
    """Catches rows per instruction or rows per cycle that are wrong by a factor."""
    schedule, at = recorded(chip), paths(chip)
    # 128 rows times one [128, 128] matrix in float32; units of size 256 take two rows at a time,
    # against the matrix twice on the diagonal.
    expected = 128 * 128 / chip.size / chip.matrix_units / chip.rows
    for path in ("loop0/if0/loop0", "loop0/if0/if2"):
        assert schedule.matmul[schedule.own(schedule.regions[at[path]])].sum() == expected
    assert schedule.hot().path in (at["loop0/if0/loop0"], at["loop0/if0/if2"])
    assert schedule.spills(schedule.root) == 0


def test_matrix_units_bound_the_cycles(chip):
    """Catches cycles below what the published rate allows, where a schedule issues faster."""
    schedule = recorded(chip)
    counts = {paths(chip)["loop0/if0/if1/loop0"]: 48}
    crowded = aot.Schedule(**{**vars(schedule), "matmul": schedule.matmul * 100})
    busy = float(crowded.runs(counts) @ crowded.matmul)
    assert crowded.bundles(counts) == schedule.bundles(counts) < busy <= crowded.cycles(counts)


def test_cost_is_the_larger_of_computing_and_reading(chip):
    """Catches the sum instead of the maximum, and a share of useful work over the wrong time."""
    schedule = recorded(chip)
    counts = {paths(chip)["loop0/if0/if1/loop0"]: 48}
    flops = 6 * 6 * 2 * 128**3
    cost = aot.cost(schedule, counts, hbm_bytes=1.0, flops=flops)
    assert cost.modelled == cost.cycles == schedule.cycles(counts)
    assert cost.useful_share == flops / chip.flops_per_cycle / cost.cycles
    slow = aot.cost(schedule, counts, hbm_bytes=1e9, flops=flops)
    assert slow.modelled == slow.hbm_cycles == pytest.approx(1e9 / chip.hbm_rate * chip.clock)
    assert slow.seconds == pytest.approx(1e9 / chip.hbm_rate) and slow.over_hbm == 1


def test_table_and_plot(chip, tmp_path):
    """Catches a table without a region, and a plot that needs a display."""
    schedule = recorded(chip)
    assert all(path in schedule.table() for path in schedule.regions)
    aot.plot(schedule, tmp_path / "plot.png", {paths(chip)["loop0/if0/if1/loop0"]: 48})
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_delay_slots_run_either_way(chip):
    """Catches delay slots counted to the guard, which would vanish where it is not taken."""
    text = ["0: { %1 = sbr.rel (%p0) target = $region7 }", *[f"{k}: {{ }}" for k in range(1, 10)]]
    text[9] = "9 PF: { } /* Start/End empty region 7 */"
    root = read_regions(text, [None] * 9 + ["PF"], chip.branch_delay)
    (guard,) = root.children
    assert (guard.start, guard.stop) == (1 + chip.branch_delay, 9)


def test_files_must_agree(chip):
    """Catches a use table of another kernel read beside the bundles."""
    bundles, utilization = (DUMPS / f"{chip.name}.txt").read_text().split("==\n", 1)
    with pytest.raises(ValueError, match="utilization"):
        aot.parse(bundles, utilization.rstrip().rpartition("\n")[0], chip)


def test_clocks_follow_from_published_rates(chip):
    """Catches a peak of the whole chip where one core's is meant, and rows per cycle off by two."""
    assert 1.4e9 < chip.clock < 2.3e9
    assert V5E.clock == pytest.approx(1.5e9, rel=0.01)
    assert V6E.clock == pytest.approx(1.75e9, rel=0.01)
