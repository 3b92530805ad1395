"""``python -m benchmarks FRAMEWORK``: measure, and report. One framework at a time, for each has threads of its own."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from batchnorm import cpu

from . import report
from .cases import Case, cases
from .frameworks import Contender, Framework, framework
from .measure import check, peak_megabytes, times
from .memory import KEPT, RETURNED, THEIR_OWN, environment
from .terminal import terminal

TITLES = {
    "jax": "JAX",
    "keras-jax": "Keras on JAX",
    "keras-tensorflow": "Keras on TensorFlow",
    "keras-torch": "Keras on PyTorch",
    "numpy": "NumPy",
    "pytorch": "PyTorch",
    "tensorflow": "TensorFlow",
}


def main() -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("framework", choices=TITLES)
    parser.add_argument("--output", type=pathlib.Path, help="benchmarks/FRAMEWORK.csv unless given")
    parser.add_argument("--plot", type=pathlib.Path, help="docs/performance-FRAMEWORK.png unless given")
    parser.add_argument("--seconds", type=float, default=0.6, help="spent on each case, at least")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="small batches, to see that it works")
    parser.add_argument("--update-docs", action="store_true", help="put the tables into README.md and docs")
    parser.add_argument("--mode", help="measure one mode anew, and keep what is written of the others")
    parser.add_argument("--report-only", action="store_true", help="report what an earlier run has written")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # what a process of this program is to measure
    options = parser.parse_args()
    name = options.framework
    output = options.output or pathlib.Path(f"benchmarks/{name}.csv")
    plot = options.plot or pathlib.Path(f"docs/performance-{name}.png")
    console = terminal()
    peers = framework(name)
    if options.memory:
        peers.configure(options.threads)
        cpu.set_num_threads(options.threads)
        measure(peers, options, output, console)
        return 0
    if not options.report_only:
        begin(peers, options, output)
        for memory in (THEIR_OWN,) if peers.KEEPS_MEMORY else (KEPT, RETURNED):
            command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--memory", memory]
            subprocess.run(command, env=environment(memory), check=True)
    conditions, rows = report.read(output)
    console.print(conditions)
    found = list(report.sections(rows, peers.PEERS))
    for section in found:
        console.print(f"[bold]{section.title}")
        table = Table(box=box.SIMPLE)
        for head in section.head:
            table.add_column(head, no_wrap=bool(head))  # only names of lines wrap
        for line in section.lines:
            table.add_row(*line)
        console.print(table)
    report.plot(rows, TITLES[name], peers.PEERS[:2], plot)
    if options.update_docs:
        tables = (f"**{section.title}**\n\n{section.markdown()}" for section in found)
        report.update(pathlib.Path("docs/benchmarks.md"), f"benchmark {name}", "\n\n".join([conditions, *tables]))
        paths = ((each, pathlib.Path(f"benchmarks/{each}.csv")) for each in TITLES)
        results = {each: report.read(path)[1] for each, path in paths if path.exists()}
        report.update(pathlib.Path("README.md"), "benchmarks", report.chosen(results, TITLES).markdown())
    console.print(f"wrote {output} and {plot}")
    return 0


def begin(peers: Framework, options: argparse.Namespace, output: pathlib.Path) -> None:
    """Write the conditions, and the rows of an earlier run that are kept."""
    earlier = report.read(output)[1] if options.mode and output.exists() else []
    kept = [row for row in earlier if row["mode"] != options.mode]
    with output.open("w", newline="") as file:
        file.write(
            f"# {processor()}, {options.threads} threads, {cpu.instruction_set()}; {peers.versions()}; medians of "
            "alternating repetitions; geometric means over shapes (least to most)\n"
        )
        writer = csv.DictWriter(file, report.FIELDS)
        writer.writeheader()
        writer.writerows(kept)


def processor() -> str:
    """Name the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {names[0] if names else platform.processor() or 'unknown processor'}"


def measure(peers: Framework, options: argparse.Namespace, output: pathlib.Path, console: Console) -> None:
    """Measure every case in this process, and write the results as they come."""
    wanted = [case for case in cases(options.framework, options.quick) if options.mode in (None, case.mode)]
    extras = [extra for extra in peers.extras(options.quick) if options.mode in (None, extra[0].mode)]
    memory = options.memory
    with output.open("a", newline="") as file, Progress(console=console) as progress:
        writer = csv.DictWriter(file, report.FIELDS)
        for case in progress.track(wanted, description=f"{options.framework}, memory {memory}"):
            found, floor = peers.contenders(case)
            check(case, found, peers)
            if case.option != "plain":  # whose price is a ratio within one run, too
                plain = peers.ours(dataclasses.replace(case, option="plain"))
                found.append(dataclasses.replace(plain, name=report.PLAIN))
            peaks = [peak_megabytes(contender) if memory == RETURNED else None for contender in found]
            *taken, least = times([*found, floor], options.seconds)
            writer.writerows(_rows(case, memory, found, taken, peaks, least))
            file.flush()
        for case, found in extras:
            check(case, found[:2], peers)
            taken = times(found, 10 * options.seconds)
            writer.writerows(_rows(case, memory, found, taken, [None] * len(found), 0))


def _rows(
    case: Case,
    memory: str,
    contenders: list[Contender],
    seconds: list[float],
    peaks: list[float | None],
    floor: float,
) -> list[dict[str, Any]]:
    return [
        {
            "network": case.network,
            "shape": case.sizes,
            "layout": case.layout,
            "dtype": case.dtype,
            "mode": case.mode,
            "option": case.option,
            "memory": memory,
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
