"""One function per subcommand; each imports what it needs after its first line is out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

POD = "pod"


def run(options: argparse.Namespace) -> int | None:
    """`moejax run FILE`: builds the job and runs it in its folder."""
    from moejax.cli.folders import run_folder

    out = Path(options.out) if options.out else run_folder(options.file)
    print(f"moejax run {options.file} -> {out}", flush=True)

    if isinstance(options.processes, int):
        from moejax.mesh.launcher import launch

        sets = [word for binding in options.bindings for word in ("--set", binding)]
        words = ["run", options.file, "--out", str(out), *sets, *["--debug"] * options.debug]
        return launch([sys.executable, "-m", "moejax", *words], options.processes)

    from moejax.mesh.processes import start

    start(pod=options.processes == POD)

    from moejax.cli.execute import execute
    from moejax.config import load_config

    execute(load_config(options.file, options.bindings), out, options.words)
    return None


def plan(options: argparse.Namespace) -> None:
    """`moejax plan FILE`: prints what the job, or a model without one, would do and cost."""
    print(f"moejax plan {options.file}", flush=True)

    from moejax.config import load_config

    model_alone = {"ModelSpec": ("run.job = @PlanModel()", "PlanModel.model = @ModelSpec()")}
    job = load_config(options.file, options.bindings, model_alone).job()
    print(job.plan() or f"{type(job).__name__} needs no plan: it costs next to nothing.")


def compile(options: argparse.Namespace) -> None:
    """`moejax compile FILE`: compiles the steps of a config for a pod that need not be there."""
    from moejax.cli.folders import run_folder

    out = Path(options.out) if options.out else run_folder(options.file)
    if options.topology and not options.out:
        out = out.with_name(f"{out.name}_{options.topology.replace(':', '-')}")
    print(f"moejax compile {options.file} -> {out}", flush=True)

    from moejax.cli.execute import execute
    from moejax.config import load_config
    from moejax.jobs.compile import Compile, for_pod

    config = load_config(options.file, options.bindings)
    if options.topology and isinstance(config.job(), Compile):
        binding = f"Compile.topology = '{options.topology}'"
        config = load_config(options.file, [binding, *options.bindings])
    execute(config, out, options.words, lambda job: for_pod(job, options.topology))


def convert(options: argparse.Namespace) -> None:
    """`moejax convert IN OUT`: a Hugging Face folder comes in, a moejax folder goes out."""
    print(f"moejax convert {options.source} -> {options.target}", flush=True)

    from moejax.config.inline import spec_from
    from moejax.jobs.convert import convert

    print(
        convert(
            options.source,
            options.target,
            dtype=options.dtype,
            grid=spec_from(options.quantize) if options.quantize else None,
            family=options.family,
            shard_bytes=options.shard_bytes,
        )
    )


def report(options: argparse.Namespace) -> None:
    """`moejax report DIR...`: draws the report of each run, and one page that compares them."""
    from moejax.report import build_report, compare_reports

    for folder in options.folders:
        print(build_report(folder))
    if len(options.folders) > 1:
        print(compare_reports(options.folders, options.out))


def systems(options: argparse.Namespace) -> None:
    """`moejax systems`: lists the systems of the literature that ship as configs."""
    from rich.console import Console

    from moejax.cli.systems import markdown, read_systems, show
    from moejax.files import find_resource

    found = read_systems(find_resource("configs", "systems"))
    if options.markdown:
        print(markdown(found), end="")
    else:
        show(found, Console())
