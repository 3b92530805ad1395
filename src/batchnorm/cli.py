"""The command line: run a TensorFlow 1 script, convert files, show the layer at work, help a bug report."""

from __future__ import annotations

import argparse
import importlib.util
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
        description="Run SCRIPT as `python SCRIPT ARGS` would, or with -m a module as `python -m` would, with "
        "BatchNormalization and batch_normalization back in tf.compat.v1.layers. If tf_keras is installed, the other "
        "layers of TensorFlow 1 are there, too.",
    )
    run.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    run.add_argument(
        "--fused",
        action="store_true",
        help="use our kernels also in graphs whose `training` is a tensor, as install(fused=True) does",
    )
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    convert = commands.add_parser(
        "convert",
        help="convert a file of variables from one framework's names to another's",
        description="Write the batch normalization layers of SOURCE to TARGET under the names of another framework. "
        "Files: .pt and .pth (a state dict), .safetensors, .msgpack (Flax), .npz, .keras, .weights.h5 and .h5 (Keras), "
        "and the prefix of a TensorFlow checkpoint. Within one framework everything else is copied as it is.",
    )
    convert.add_argument("source", metavar="SOURCE")
    convert.add_argument("target", metavar="TARGET")
    convert.add_argument(
        "--to",
        choices=["tensorflow", "torch", "flax", "linen"],
        help="names to write, if not those that the kind of TARGET suggests; tensorflow's are Keras' and NumPy's, too",
    )
    convert.add_argument("--into", metavar="FILE", help="make TARGET a copy of FILE with these layers' variables")
    convert.add_argument(
        "--rename",
        metavar="PATTERN=REPLACEMENT",
        action="append",
        default=[],
        help="replace a regular expression in the names of layers; may be given several times",
    )
    convert.add_argument(
        "--renorm", action=argparse.BooleanOptionalAction, help="with or without the averages of batch renormalization"
    )
    convert.add_argument("--epsilon", type=float, help="that of the layers, where standard deviations follow from it")
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
    if options.command == "convert":
        return _convert(options)
    return _run(options.script, options.arguments, options.module, options.fused or None)


def _convert(options: argparse.Namespace) -> int:
    from .conversion import convert_file

    rename = [pair.rpartition("=")[::2] for pair in options.rename]  # patterns may hold the sign, too
    if not all(pattern for pattern, _ in rename):
        print(f"batchnorm convert: --rename must be PATTERN=REPLACEMENT; received {options.rename}", file=sys.stderr)
        return 2
    try:
        done = convert_file(
            options.source,
            options.target,
            to=options.to,
            into=options.into,
            rename=rename,
            renorm=options.renorm,
            epsilon=options.epsilon,
        )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"batchnorm convert: {error}", file=sys.stderr)
        return 2
    for source, target in done.layers.items():
        print(f"{source or '(the file itself)'} -> {target or '(the file itself)'}")
    if done.left:
        print(f"{done.left} other variables are not in {options.target}")
    return 0


def _run(script: str, arguments: list[str], module: bool, fused: bool | None) -> int:
    if importlib.util.find_spec("tf_keras") is not None:
        os.environ.setdefault(
            "TF_USE_LEGACY_KERAS", "1"
        )  # read when TensorFlow is imported, by a package of -m or here
    sys.path.insert(0, os.getcwd() if module else os.path.dirname(os.path.abspath(script)))
    if not (_is_module(script) if module else os.path.isfile(script)):
        print(f"batchnorm run: no {'module' if module else 'script at'} {script!r}", file=sys.stderr)
        return 2
    try:
        from .tensorflow import install
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        print('batchnorm run needs TensorFlow: pip install "batchnorm[tensorflow]"', file=sys.stderr)
        return 2
    install(fused=fused)
    sys.argv = [script, *arguments]
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except (AttributeError, ImportError) as error:
        hint = _hint(str(error))
        if hint:
            error.args = (f"{error}\n\nbatchnorm run: {hint}",)
            if isinstance(error, ImportError):
                error.msg = error.args[0]  # which it prints
        raise
    return 0


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _hint(message: str) -> str | None:
    """What to do about a part of TensorFlow 1 that a script has not found."""
    if any(part in message for part in ("tensorflow.contrib", "'contrib'", "tensorflow.estimator", "'estimator'")):
        return "TensorFlow 2 has no tf.contrib, and today's no tf.estimator; no package brings them back."
    if importlib.util.find_spec("tf_keras") is None and ("Keras 3" in message or "tensorflow" in message):
        return 'the other layers and the cells of TensorFlow 1 come with pip install "batchnorm[tensorflow1]".'
    return None
