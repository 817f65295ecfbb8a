"""Allocations against every allocation, and what each must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.compress.solvers import (
    Exhaustive,
    GreedyUpgrades,
    IntegerProgram,
    Problem,
    RandomAllocation,
)
from moejax.core import MoejaxError, SpecError

SOLVERS = (IntegerProgram(), GreedyUpgrades(), RandomAllocation(seed=0))


def pmq(seed, experts=8, scale=1.0, **fields):
    """Costs like PMQ's at 1, 2 and 3 bits: skewed significance times an error that falls."""
    draws = np.random.default_rng(seed)
    significance_E = draws.lognormal(0, 1.5, experts)
    error_ExB = np.sort(draws.random((experts, 3)), axis=1)[:, ::-1] ** 2
    fields = {"budget": 12 + seed % 9, "at_least": {2: 1, 1: 1}} | fields
    return Problem(scale * significance_E[:, None] * error_ExB, np.array([1, 2, 3]), **fields)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_the_integer_program_finds_the_optimum(scale):
    """Catches a gap that is allowed, tiny costs taken for zero, and a bound on 3 bits left out."""
    for seed in range(50 if scale == 1 else 10):
        problem = pmq(seed, scale=scale)
        choice_E, oracle_E = IntegerProgram()(problem), Exhaustive()(problem)
        assert problem.allows(choice_E)
        assert problem.cost(choice_E) == pytest.approx(problem.cost(oracle_E), rel=1e-9, abs=0)
        assert problem.bits(choice_E) <= 12 + seed % 9


def test_constraints_bind():
    """Catches an oracle and a program that both forget the least counts."""
    free, bound = pmq(3, budget=14, at_least={}), pmq(3, budget=14, at_least={2: 3, 1: 0})
    for problem, least in ((free, 0), (bound, 3)):
        choice_E = IntegerProgram()(problem)
        assert problem.cost(choice_E) == pytest.approx(problem.cost(Exhaustive()(problem)))
        assert (choice_E == 2).sum() >= least
    assert bound.cost(IntegerProgram()(bound)) > 1.01 * free.cost(IntegerProgram()(free))


@st.composite
def problems(draw):
    """Small problems with a solution, whatever their costs."""
    shards = draw(st.sampled_from([1, 2, 3]))
    experts = shards * draw(st.integers(1, 6 // shards))
    bits = draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    draws = np.random.default_rng(draw(st.integers(0, 2**16)))
    cost_ExB = draws.lognormal(0, 3, (experts, len(bits))) * draw(st.sampled_from([1e-12, 1, 1e9]))
    choice = draw(st.integers(0, len(bits) - 1))
    at_least = {choice: draw(st.integers(0, experts))}
    problem = Problem(cost_ExB, np.array(bits), np.inf, at_least, shards)
    least_B = problem.least_counts()
    least = least_B @ problem.bits_B + (experts - least_B.sum()) * min(bits)
    return Problem(cost_ExB, np.array(bits), least + draw(st.integers(0, 20)), at_least, shards)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_all_solvers_keep_the_constraints_and_none_beats_the_program(problem):
    """Catches a solver that overspends, breaks a bucket, or is better than the optimum."""
    oracle = problem.cost(Exhaustive()(problem))
    best = problem.cost(IntegerProgram()(problem))
    assert best == pytest.approx(oracle, rel=1e-9, abs=1e-11 * np.abs(problem.cost_ExB).max())
    for solver in SOLVERS:
        choice_E = solver(problem)
        assert choice_E.shape == (problem.experts,)
        assert problem.allows(choice_E)
        assert problem.cost(choice_E) >= oracle * (1 - 1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_buckets_divide_among_shards(solver):
    """Catches counts that leave one device of an expert axis with more experts than another."""
    problem = pmq(5, experts=24, budget=53.5, shards=4)
    counts_B = np.bincount(solver(problem), minlength=3)
    assert (counts_B % 4 == 0).all() and counts_B[1] >= 4 and counts_B[2] >= 4
    assert counts_B @ problem.bits_B == 52


def test_greedy_is_near_the_optimum_and_beats_the_control():
    """Catches upgrades taken in the order of experts, or only those of one step."""
    problems = [pmq(seed, experts=32, budget=64) for seed in range(5)]
    for problem in problems:
        best, greedy = (problem.cost(s(problem)) for s in (IntegerProgram(), GreedyUpgrades()))
        control = [problem.cost(RandomAllocation(seed=s)(problem)) for s in range(10)]
        assert best <= greedy < 1.05 * best < min(control)


def test_the_random_control_stores_what_the_program_stores():
    """Catches a control of fewer bits, one that ignores its seed, and one order for all layers."""
    problem = pmq(1, experts=24, budget=50)
    program = np.sort(IntegerProgram()(problem))
    drawn = [RandomAllocation(seed=s)(problem) for s in (0, 1)]
    other = pmq(1, experts=24, budget=50, name="layer 1")
    for choice_E in (*drawn, RandomAllocation(seed=0)(other)):
        np.testing.assert_array_equal(np.sort(choice_E), program)
    np.testing.assert_array_equal(drawn[0], RandomAllocation(seed=0)(problem))
    assert not np.array_equal(*drawn)
    assert not np.array_equal(drawn[0], RandomAllocation(seed=0)(other))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"budget": 10}, r"1.25 mean bits are not enough .* least is 1.375"),
        ({"budget": 15, "shards": 4}, "least is 2.5"),
        ({"at_least": {2: 9}}, "at_least = {2: 9} is impossible with 8 experts"),
        ({"at_least": {2: 1, 1: 1, 0: 1}, "shards": 4}, "in whole shards of 4"),
        ({"at_least": {3: 1}}, "and 3 choices"),
        ({"shards": 3}, "shards = 3 does not divide 8 experts"),
    ],
)
@pytest.mark.parametrize("solver", [*SOLVERS, Exhaustive()])
def test_problems_without_a_solution_are_refused(solver, fields, wanted):
    """Catches an infeasible program whose answer is read all the same."""
    with pytest.raises(SpecError, match=wanted):
        solver(pmq(0, **fields))


def test_costs_that_are_no_numbers_are_refused():
    """Catches NaN sorted somewhere."""
    problem = pmq(0)
    problem.cost_ExB[3, 1] = np.nan
    for solver in (*SOLVERS, Exhaustive()):
        with pytest.raises(MoejaxError, match=r"experts \[3\] of the experts are not finite"):
            solver(problem)


def test_too_many_allocations_are_not_tried():
    """Catches an oracle that eats all memory."""
    with pytest.raises(SpecError, match=r"3\^16"):
        Exhaustive()(pmq(0, experts=16, budget=40))


def test_a_search_cut_short_is_an_error():
    """Catches the best allocation so far returned as the optimum."""
    with pytest.raises(MoejaxError, match="IntegerProgram.seconds"):
        IntegerProgram(seconds=1e-9)(pmq(0, experts=64, budget=131))
