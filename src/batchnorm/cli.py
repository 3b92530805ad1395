"""The command line: run a TensorFlow 1 script with the layer back in place, show it at work, help a bug report."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from . import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="batchnorm", description="Batch normalization, complete.")
    parser.add_argument("--version", action="version", version=f"batchnorm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run a TensorFlow 1 script as it is",
        description="Run SCRIPT as `python SCRIPT ARGS` would, with BatchNormalization and batch_normalization back in "
        "tf.compat.v1.layers.",
    )
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    commands.add_parser("info", help="print what a bug report needs")
    commands.add_parser("demo", help="train small networks on handwritten digits", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.command == "demo":
        from .demo import main as demo

        return demo(rest, prog="batchnorm demo")
    if options.command == "info" and not rest:
        from .info import lines

        for line in lines():
            print(line)
        return 0
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _run(options.script, options.arguments)


def _run(script: str, arguments: list[str]) -> int:
    if not os.path.isfile(script):
        print(f"batchnorm run: no script at {script!r}", file=sys.stderr)
        return 2
    try:
        from .tensorflow import install
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        print('batchnorm run needs TensorFlow: pip install "batchnorm[tensorflow]"', file=sys.stderr)
        return 2
    install()
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")
    return 0
