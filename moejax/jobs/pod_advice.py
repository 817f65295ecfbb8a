"""What to change when a step does not fit its devices, with the numbers to set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moejax.mesh import MeshSpec, Rules

_ROOM = 0.9  # of the HBM, that a suggestion aims at


def advice(
    step: Any, mesh: MeshSpec, rules: Rules, held: Mapping[str, int], used: float, hbm: float
) -> list[str]:
    """Changes, the most promising first; none where the step fits.

    held: bytes of one device that stay between steps, by what they are; used: all of one device at
    the worst moment; hbm: what it has.
    """
    if used <= hbm:
        return []
    kept = sum(held.values())
    passing, target = max(used - kept, 0.0), _ROOM * hbm
    found: list[str] = []
    if kept > target / 2 or kept + passing / 8 > target:
        found += _for_what_is_held(step, mesh, rules, held, target)
    room = target - kept
    if passing > room:
        factor = _power_of_two(passing / room) if room > 0 else 2
        found += _for_what_passes(step, mesh, factor)
    return found


def _for_what_is_held(
    step: Any, mesh: MeshSpec, rules: Rules, held: Mapping[str, int], target: float
) -> list[str]:
    kept = sum(held.values())
    found = []
    factor = _power_of_two(2 * kept / target)
    if mesh.data > 1:
        more = min(factor, mesh.data)
        found.append(
            f"MeshSpec.fsdp = {mesh.fsdp * more} and MeshSpec.data = {mesh.data // more}: "
            f"parameters and their state, {_gb(kept)} of a device, are cut {more} times finer."
        )
    if len(rules.embed) == 1 and mesh.expert * mesh.node > 1:
        found.append(
            "Rules.embed = ('fsdp', 'node', 'expert'): what is no expert is cut over the devices "
            "of expert parallelism too."
        )
    if hasattr(step, "recipe"):
        if "sequence state" in held and held["sequence state"] > kept / 2:
            found.append(_halved(step, "length", 2, "the sequence state has a row per token"))
        elif not step.recipe:
            found.append(
                "recipe = (@Quantize(),) with SymmetricGrid.bits = 4: experts take a quarter of "
                "their bfloat16 bytes."
            )
    if not found:
        found.append(
            f"A larger topology: {_gb(kept)} stay on each device, and every axis that cuts them is "
            "at its end."
        )
    return found


def _for_what_passes(step: Any, mesh: MeshSpec, factor: int) -> list[str]:
    rows = math.prod((mesh.data, mesh.fsdp, mesh.node, mesh.expert))
    found = []
    if hasattr(step, "accumulate"):
        each = step.batch // step.accumulate
        more = min(factor, max(each // rows, 1))
        if more > 1:
            found.append(
                f"accumulate = {step.accumulate * more}: {each // more} rows at a time instead of "
                f"{each}, the same batch."
            )
        if more < factor:
            short = factor // more
            found.append(_halved(step, "length", short, "scores of attention grow with its square"))
            found.append(
                "Remat: keep the results of the dispatch alone and compute the rest again."
            )
    else:
        found.append(_halved(step, "batch", factor, "activations grow with it"))
    return found


def _halved(step: Any, field: str, factor: int, why: str) -> str:
    value = max(getattr(step, field) // factor, 1)
    return f"{field} = {value} instead of {getattr(step, field)}: {why}."


def _power_of_two(ratio: float) -> int:
    return 2 ** max(1, math.ceil(math.log2(max(ratio, 1.0))))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
