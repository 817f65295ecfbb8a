"""`python -m experiments.benchmarks tpu | cpu | page`: fills docs/benchmarks, writes its page."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from moejax_kernels.chips import CHIPS

from experiments.benchmarks import cpu, page, peers, results, tpu


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one benchmark, merges what it found into its JSON, writes the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    commands = parser.add_subparsers(dest="command", required=True)
    on_tpu = commands.add_parser("tpu", help="modelled cycles of TPU kernels; wants libtpu")
    on_tpu.add_argument("shapes", nargs="*", help="like olmoe/8/gate or olmoe; all bars without")
    on_tpu.add_argument("--all", action="store_true", help="every shape of shapes.py")
    on_tpu.add_argument("--chips", nargs="+", choices=sorted(CHIPS), default=["v5e", "v6e"])
    on_tpu.add_argument(
        "--tilings", type=int, default=8, help="tilings of megablox to compile; 0: ours alone"
    )
    on_cpu = commands.add_parser("cpu", help="interleaved times on this machine")
    cpu.add_arguments(on_cpu)
    commands.add_parser("page", help="the page from the JSON there is")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    command = "python -m experiments.benchmarks " + shlex.join(arguments or sys.argv[1:])
    if options.command == "tpu":
        shapes = tpu.SHAPES if options.all else tpu.named(options.shapes) or tpu.HEADLINE
        rows = tpu.rows_of(shapes, options.chips, options.tilings, options.out)
        results.record(options.out / "tpu.json", command, rows, missing=list(peers.missing()))
    elif options.command == "cpu":
        rows = cpu.rows_of(options)
        results.record(options.out / "cpu.json", command, rows, machine=cpu.machine())
    page.write(options.out, options.page)


if __name__ == "__main__":
    main()
