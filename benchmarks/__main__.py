"""``python -m benchmarks FRAMEWORK``: measure, and report. One framework at a time, for each has threads of its own."""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
import platform
import sys
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from batchnorm import native

from . import report
from .cases import Case, cases
from .frameworks import Contender, Framework, framework
from .measure import check, peak_megabytes, times

TITLES = {"tensorflow": "TensorFlow", "pytorch": "PyTorch"}


def main() -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("framework", choices=TITLES)
    parser.add_argument("--output", type=pathlib.Path, help="benchmarks/FRAMEWORK.csv unless given")
    parser.add_argument("--plot", type=pathlib.Path, help="docs/performance-FRAMEWORK.png unless given")
    parser.add_argument("--seconds", type=float, default=0.6, help="spent on each case, at least")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="small batches, to see that it works")
    parser.add_argument("--update-readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--mode", help="measure one mode anew, and keep what is written of the others")
    parser.add_argument("--report-only", action="store_true", help="report what an earlier run has written")
    options = parser.parse_args()
    name = options.framework
    output = options.output or pathlib.Path(f"benchmarks/{name}.csv")
    plot = options.plot or pathlib.Path(f"docs/performance-{name}.png")
    console = Console()
    chosen = framework(name)
    if not options.report_only:
        chosen.configure(options.threads)
        native.set_num_threads(options.threads)
        measure(chosen, options, output, console)
    rows = report.read(output)
    head, lines = report.headings(chosen.PEERS), report.summary(rows, chosen.PEERS)
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    report.plot(rows, TITLES[name], chosen.PEERS[:2], plot)
    if options.update_readme:
        conditions = (
            f"{platform.machine()}, {options.threads} threads, {native.instruction_set()}; {chosen.versions()}; "
            "medians of alternating repetitions, geometric means over shapes (least to most). Larger is better in the "
            "columns with ×, smaller in those with ÷."
        )
        report.update_readme(name, head, lines, conditions, pathlib.Path("README.md"))
    console.print(f"wrote {output} and {plot}")
    return 0


def measure(chosen: Framework, options: argparse.Namespace, output: pathlib.Path, console: Console) -> None:
    """Measure every case, and write the results as they come."""
    kept = [row for row in report.read(output) if row["mode"] != options.mode] if options.mode else []
    wanted = [case for case in cases(options.framework, options.quick) if options.mode in (None, case.mode)]
    extras = [extra for extra in chosen.extras(options.quick) if options.mode in (None, extra[0].mode)]
    with output.open("w", newline="") as file, Progress(console=console) as progress:
        writer = csv.DictWriter(file, report.FIELDS)
        writer.writeheader()
        writer.writerows(kept)
        for case in progress.track(wanted, description="measuring"):
            found, floor = chosen.contenders(case)
            check(case, found, chosen)
            peaks = [peak_megabytes(contender) for contender in found]
            *taken, least = times([*found, floor], options.seconds)
            writer.writerows(_rows(case, found, taken, peaks, least))
            file.flush()
        for case, found in extras:
            if len(found) > 1:
                check(case, found[:2], chosen)
            taken = times(found, 10 * options.seconds, most=20000)
            writer.writerows(_rows(case, found, taken, [None] * len(found), 0))
            for contender, seconds in zip(found, taken, strict=True):
                console.print(f"{case.network}, {case.layout}, {contender.name}: {seconds * 1e6:.1f} µs")


def _rows(
    case: Case, contenders: list[Contender], seconds: list[float], peaks: list[float | None], floor: float
) -> list[dict[str, Any]]:
    return [
        {
            "network": case.network,
            "shape": "x".join(map(str, case.shape)),
            "layout": case.layout,
            "dtype": case.dtype,
            "mode": case.mode,
            "option": case.option,
            "megabytes": round(case.megabytes, 3),
            "kernel": contender.kernel() or "",
            "floor": round(floor * 1e3, 4),
            "contender": contender.name,
            "milliseconds": round(taken * 1e3, 4),
            "peak_megabytes": "" if peak is None else round(peak, 1),
        }
        for contender, taken, peak in zip(contenders, seconds, peaks, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
