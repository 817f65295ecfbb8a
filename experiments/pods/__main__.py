"""Compiles the shipped pod configs, one after the other, and writes docs/pods.md: `make pods`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.cli.main import main as moejax
from moejax.core.atomic import write_atomically
from moejax.jobs.compile import read_facts
from moejax.report.pods import pod_markdown

PODS = {
    "olmoe_v5e_256": "OLMoE-1B-7B, training",
    "mixtral_v5p_128": "Mixtral 8x7B, training",
    "deepseek_v3_v5p_512": "the shape of DeepSeek-V3, training",
    "qwen15_moe_int4_v6e_8": "Qwen1.5-MoE, experts in 4 bits, serving",
}
INTRODUCTION = """# Pods

What the steps of shipped configs take on pods, read from the programs that the TPU compiler made of
them; no TPU was there. Rebuilt by `make pods`. Memory is the compiler's own count. Times are
modelled, at the least and at peak rates, and nobody has measured them. A Pallas kernel counts what
its author states; packed kernels state no flops, so that their part shows none.
"""


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/pods.md: a line per step, then all tables. found: config -> facts of its run."""
    columns = ("config", "topology", "mesh", "step", "tokens", "GB of a device", "compiled in s")
    lines = [INTRODUCTION, "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for config, facts in found.items():
        for name, step in facts["steps"].items():
            memory = f"{step['memory']['used'] / 1e9:.1f} of {facts['hbm'] / 1e9:.0f}"
            seconds = f"{step['compile_seconds']:.0f}" if "compile_seconds" in step else ""
            memory = memory if step["fits"] else f"{memory}: does not fit"
            cells = (f"mesh/{config}", facts["topology"], facts["mesh"], name)
            lines.append("| " + " | ".join((*cells, f"{step['tokens']:,}", memory, seconds)) + " |")
    for config, facts in found.items():
        lines += ["", f"## {PODS[config]}", "", pod_markdown(facts, "##")]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Exit status 1 when a config did not compile or does not fit."""
    found = {}
    for config in PODS:
        out = Path("runs") / "pods" / config
        if status := moejax(["compile", f"mesh/{config}", "--out", str(out)]):
            return status
        found[config] = read_facts(out)
    write_atomically(Path("docs") / "pods.md", page(found))
    return int(
        not all(step["fits"] for facts in found.values() for step in facts["steps"].values())
    )


if __name__ == "__main__":
    sys.exit(main())
