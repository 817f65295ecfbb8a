"""The `moejax` command: arguments in, exit status out.

Nothing heavy is imported before the arguments are understood and the first line is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import moejax
from moejax.cli import commands
from moejax.cli.platform import choose_platform, one_blas_thread

EXAMPLES = """examples:
  moejax run quickstart
  moejax run train/nano --set Train.steps=200 --out runs/short
  moejax run runs/short/config.gin            take up an interrupted training run
  moejax plan report                          what it would cost, before anything is loaded
  moejax compile mesh/olmoe_v5e_256           memory, traffic and time on a pod, without one
  moejax report runs/quickstart runs/mine     each report, and runs/comparison side by side
  moejax convert OLMoE-1B-7B models/olmoe     a Hugging Face folder comes in
  moejax systems                              the systems of the literature that ship as configs

A config is looked for in the working folder, then among those that ship with moejax.
"""
SET_HELP = (
    "overrides a value of the config, such as Train.steps=200 "
    "or \"SavedModel.path='nano'\"; repeatable"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0: done; 1: a defect of moejax, with a traceback; 2: something the user can mend, named without
    a traceback unless --debug is given; 130 and 143: stopped by Ctrl-C and by SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    options.words = ["moejax", *words]
    choose_platform(os.environ)
    one_blas_thread(os.environ)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt as stop:
        print(f"moejax: interrupted.{options.after_stop}", file=sys.stderr)
        return getattr(stop, "status", 130)
    except SystemExit:  # 128 + signal, from a job that saved its state when the signal came
        print(f"moejax: interrupted.{options.after_stop}", file=sys.stderr)
        raise
    except BrokenPipeError:  # `moejax systems | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        from moejax.core.errors import MoejaxError

        if options.debug or not isinstance(error, MoejaxError):
            raise
        print(error, file=sys.stderr)
        return 2
    return 0


def _processes(text: str) -> int | str:
    if text != commands.POD and (not text.isdigit() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 1 nor {commands.POD}")
    return text if text == commands.POD else int(text)


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="moejax", description=moejax.__doc__, epilog=EXAMPLES, formatter_class=layout
    )
    parser.add_argument("--version", action="version", version=f"moejax {moejax.__version__}")
    parser.set_defaults(after_stop="")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("file", metavar="FILE", help="a gin file; .gin may be left out")
    config.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help=SET_HELP, dest="bindings"
    )

    run = subparsers.add_parser(
        "run",
        parents=[config, common],
        help="run a config and write a run folder",
        epilog=EXAMPLES,
        formatter_class=layout,
    )
    run.add_argument(
        "--out",
        metavar="DIR",
        help="the run folder (default: runs/ and the name of FILE); a folder that holds the same "
        "run is taken up where it stopped",
    )
    run.add_argument(
        "--processes",
        metavar="N",
        type=_processes,
        help="train in N processes of this machine, or, as `pod`, together with the other hosts of "
        "this TPU slice; see docs/multi_host.md",
    )
    run.set_defaults(
        command=commands.run, after_stop=" The same command takes the run up where it stopped."
    )

    plan = subparsers.add_parser(
        "plan", parents=[config, common], help="say what a config would do and cost"
    )
    plan.set_defaults(command=commands.plan)

    compile_ = subparsers.add_parser(
        "compile",
        parents=[config, common],
        help="compile the steps of a config for a pod, and read what they take off the program",
    )
    compile_.add_argument(
        "--topology", metavar="NAME", help="such as v5e:16x16, v5p:8x8x8 or h100x8"
    )
    compile_.add_argument(
        "--out", metavar="DIR", help="the run folder (default: runs/, FILE and NAME)"
    )
    compile_.set_defaults(command=commands.compile)

    report = subparsers.add_parser(
        "report", parents=[common], help="draw the reports of runs anew, and compare several"
    )
    report.add_argument("folders", metavar="DIR", nargs="+", help="folders of runs")
    report.add_argument(
        "--out",
        metavar="DIR",
        default="runs/comparison",
        help="folder of the page that compares several runs (default: runs/comparison)",
    )
    report.set_defaults(command=commands.report)

    convert = subparsers.add_parser(
        "convert",
        parents=[common],
        help="bring a Hugging Face folder in, or a moejax folder out",
        description="What IN holds decides: config.json comes in, model.json goes out.",
    )
    convert.add_argument("source", metavar="IN", help="the folder of a model")
    convert.add_argument("target", metavar="OUT", help="a new folder")
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of plain weights (default: what they are stored in)",
    )
    convert.add_argument(
        "--quantize",
        metavar="GRID",
        help="coming in: round experts to a grid while they load, such as "
        '"SymmetricGrid(bits=4, group=128)"',
    )
    convert.add_argument("--family", help="going out: whose names (default: where it came from)")
    convert.add_argument(
        "--shard-bytes", metavar="N", type=int, help="going out: most bytes of one file (5e9)"
    )
    convert.set_defaults(command=commands.convert)

    systems = subparsers.add_parser(
        "systems", parents=[common], help="list the systems of the literature that ship as configs"
    )
    systems.add_argument("--markdown", action="store_true", help="as the page docs/systems.md")
    systems.set_defaults(command=commands.systems)
    return parser
