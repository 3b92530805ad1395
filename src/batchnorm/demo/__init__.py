"""The demo: what the papers claim, measured in minutes on small images of digits."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .digits import Digits
    from .experiments import Comparison, Curve, Experiment, Outcome, Result, Run

__all__ = ["main"]

_PACKAGES = {
    "tensorflow": "TensorFlow",
    "torch": "PyTorch",
    "jax": "JAX",
    "keras": "Keras",
    "flax": "Flax",
    "optax": "Optax",
    "sklearn": "scikit-learn",
    "matplotlib": "Matplotlib",
    "rich": "Rich",
}
_FRAMEWORKS = {
    "tensorflow": ("tensorflow", "demo"),
    "torch": ("pytorch", "demo,torch"),
    "jax": ("jax", "demo,flax"),
    "keras": ("keras", "demo,keras"),
}
"""The module here that runs the experiments on a framework, and the extras that bring what it needs."""


def main(argv: Sequence[str] | None = None, prog: str = "batchnorm demo") -> int:
    """Run the demo from the command line.

    Args:
        argv: The arguments, by default those of the process.
        prog: Name of the command in messages.

    Returns:
        The exit status: 0, or 2 if a package is missing.
    """
    arguments = _parser(prog).parse_args(argv)
    if not arguments.output.absolute().parent.is_dir():
        print(f"{prog}: --output must be in a folder that exists; received {arguments.output}", file=sys.stderr)
        return 2
    if arguments.backend is not None:
        if arguments.framework != "keras":
            print(f"{prog}: --backend is for --framework keras; received {arguments.framework}", file=sys.stderr)
            return 2
        os.environ["KERAS_BACKEND"] = arguments.backend  # which Keras reads when it is imported
    try:
        run = _framework(arguments.framework)
        from . import digits, experiments, report
    except ModuleNotFoundError as error:
        package = _PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        extras = _FRAMEWORKS[arguments.framework][1]
        print(f'{prog} needs {package}: pip install "batchnorm[{extras}]"', file=sys.stderr)
        return 2
    comparisons = experiments.quick(experiments.COMPARISONS) if arguments.quick else experiments.COMPARISONS
    report.announce(comparisons, arguments.seeds, _PACKAGES[arguments.framework])
    results = _measure(run, comparisons, digits.load(), arguments.seeds)
    report.show(results)
    report.draw(results, arguments.output)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train small networks on scans of digits, with and without each feature of the layer; print a "
        "table and draw a figure. Takes some minutes on two cores.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("batchnorm-demo.png"), metavar="PATH", help="figure to write, a PNG"
    )
    parser.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs of each experiment (default: 3)")
    parser.add_argument(
        "--framework",
        choices=list(_FRAMEWORKS),
        default="tensorflow",
        help="what to run it on (default: tensorflow); the experiments are the same",
    )
    parser.add_argument(
        "--backend", choices=["tensorflow", "jax", "torch"], help="what Keras computes with (default: as configured)"
    )
    parser.add_argument("--quick", action="store_true", help="train for two steps only, to see that all of it works")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an int that is at least 1; received {text!r}")
    return int(text)


def _framework(name: str) -> Run:
    """Import what runs the experiments; quietly, for TensorFlow reports on the processor while it is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silence():
        run: Run = importlib.import_module(f".{_FRAMEWORKS[name][0]}", __name__).run
    return run


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard what libraries write to the standard error stream, past Python and before any log level holds."""
    sys.stderr.flush()
    stream = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stream, 2)
        os.close(stream)


def _measure(run: Run, comparisons: Sequence[Comparison], digits: Digits, seeds: int) -> list[Result]:
    """Run every experiment with every seed, as many at a time as there are processors."""
    from .experiments import Outcome, Result
    from .report import Progress

    with Progress(comparisons, seeds) as progress, ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:

        def job(comparison: Comparison, experiment: Experiment, seed: int) -> Curve:
            curve = run(experiment, digits, seed, lambda steps: progress.advance(comparison, steps))
            progress.finish()
            return curve

        jobs = {
            (comparison, experiment): [pool.submit(job, comparison, experiment, seed) for seed in range(seeds)]
            for comparison in comparisons
            for experiment in comparison.experiments
        }

        def outcome(comparison: Comparison, experiment: Experiment) -> Outcome:
            return Outcome(experiment, tuple(curve.result() for curve in jobs[comparison, experiment]))

        try:
            return [
                Result(comparison, tuple(outcome(comparison, experiment) for experiment in comparison.experiments))
                for comparison in comparisons
            ]
        except BaseException:  # let the runs under way end, and start no other
            pool.shutdown(wait=False, cancel_futures=True)
            raise
