"""``python -m benchmarks``: measure, and report."""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
import platform
import sys
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from batchnorm import native

from . import report
from .cases import cases
from .contenders import contenders, tiny_numpy
from .measure import check, peak_megabytes, times


def main() -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results.csv"))
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("docs/performance.png"))
    parser.add_argument("--seconds", type=float, default=0.6, help="spent on each case, at least")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="small batches, to see that it works")
    parser.add_argument("--update-readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--mode", help="measure one mode anew, and keep what is written of the others")
    parser.add_argument("--report-only", action="store_true", help="report what an earlier run has written")
    options = parser.parse_args()
    console = Console()
    warnings.filterwarnings("ignore", module="tf_keras|benchmarks")  # the original's own deprecations
    if not options.report_only:
        tf.config.threading.set_intra_op_parallelism_threads(options.threads)
        native.set_num_threads(options.threads)
        measure(options, console)
    rows = report.read(options.output)
    lines = report.summary(rows)
    table = Table(*report.HEADINGS)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    report.plot(rows, options.plot)
    if options.update_readme:
        conditions = (
            f"{platform.machine()}, {options.threads} threads, {native.instruction_set()}; TensorFlow "
            f"{tf.__version__}, Keras {tf.keras.version()}; medians of alternating repetitions, geometric means over "
            "shapes (least to most). Larger is better in the columns with ×, smaller in those with ÷."
        )
        report.update_readme(lines, conditions, pathlib.Path("README.md"))
    console.print(f"wrote {options.output} and {options.plot}")
    return 0


def measure(options: argparse.Namespace, console: Console) -> None:
    """Measure every case, and write the results as they come."""
    everything = [case for case in cases(options.quick) if options.mode in (None, case.mode)]
    kept = [row for row in report.read(options.output) if row["mode"] != options.mode] if options.mode else []
    with options.output.open("w", newline="") as file, Progress(console=console) as progress:
        writer = csv.DictWriter(file, report.FIELDS)
        writer.writeheader()
        writer.writerows(kept)
        for case in progress.track(everything, description="measuring"):
            found, floor = contenders(case)
            check(case, found)
            peaks = [peak_megabytes(contender) for contender in found]
            *taken, least = times([*found, floor], options.seconds)
            for contender, seconds, peak in zip(found, taken, peaks, strict=True):
                writer.writerow(
                    {
                        "network": case.network,
                        "shape": "x".join(map(str, case.shape)),
                        "layout": case.layout,
                        "dtype": case.dtype,
                        "mode": case.mode,
                        "option": case.option,
                        "megabytes": round(case.megabytes, 3),
                        "kernel": contender.kernel() or "",
                        "floor": round(least * 1e3, 4),
                        "contender": contender.name,
                        "milliseconds": round(seconds * 1e3, 4),
                        "peak_megabytes": "" if peak is None else round(peak, 1),
                    }
                )
            file.flush()
    small = tiny_numpy()
    microseconds = times([small], 0.5, most=20000)[0] * 1e6
    console.print(f"(64, 16) through NumPy, a forward call in training: {microseconds:.1f} µs ({small.kernel()})")


if __name__ == "__main__":
    sys.exit(main())
