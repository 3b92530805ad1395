"""``python -m benchmarks.before_after OLD.whl NEW.whl``: has a change of this package made any call slower?

Each run is a process of the old wheel and one of the new. They make the same call, prepare at the same time, and are
timed by turns, old, new, new, old, so that what else the machine does meets both. Rows that differ by more than the
limit, either way, are measured again in new processes, and judged by that.
"""

from __future__ import annotations

import argparse
import csv
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .cases import Case, cases, small_calls
from .memory import KEPT, RETURNED, environment
from .terminal import terminal
from .wheels import Worker, answer, install

FRAMEWORKS = ("numpy", "pytorch", "tensorflow")
FIELDS = ("framework", "network", "shape", "layout", "dtype", "mode", "option", "old_ms", "new_ms", "ratio", "least",
          "most", "again")  # fmt: skip


class Row(NamedTuple):
    """What one call took, in seconds: the median within each run."""

    framework: str
    number: int
    case: Case
    old: list[float]
    new: list[float]
    again: bool = False

    @property
    def ratios(self) -> list[float]:
        """New to old, by run."""
        return [new / old for old, new in zip(self.old, self.new, strict=True)]

    @property
    def ratio(self) -> float:
        """The median over the runs."""
        return statistics.median(self.ratios)


def main() -> int:
    """Do what the command line says, and return the exit status: 1 if a row or the mean is above its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after", description=__doc__)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="of each turn; a row of a run has four")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", choices=(KEPT, RETURNED), default=KEPT, help="what is done with that of old arrays")
    parser.add_argument("--row-limit", type=float, default=1.08, help="of a row's ratio, new to old")
    parser.add_argument("--mean-limit", type=float, default=1.00, help="of the geometric mean over all rows")
    parser.add_argument("--worst", type=int, default=15, help="rows to show")
    parser.add_argument("--output", type=pathlib.Path, help="a CSV of every row")
    parser.add_argument("--quick", action="store_true", help="small batches, to see that it works")
    options = parser.parse_args()
    console = terminal()
    begin = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        folders = [install(wheel, pathlib.Path(place, name)) for name, wheel in _named(options)]
        for framework in options.frameworks:
            found = measure(framework, listed(framework, options.quick), folders, options, console)
            # Either way: to repeat the slow ones alone would make the mean look better than it is.
            apart = [row for row in found if abs(math.log(row.ratio)) > math.log(options.row_limit)]
            again = measure(framework, [(row.number, row.case) for row in apart], folders, options, console)
            by_number = {row.number: row._replace(again=True) for row in again}
            rows += [by_number.get(row.number, row) for row in found]
    if options.output:
        write(rows, options.output)
    mean = report(rows, options, console)
    console.print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")
    return 1 if mean > options.mean_limit or any(row.ratio > options.row_limit for row in rows) else 0


def _named(options: argparse.Namespace) -> list[tuple[str, pathlib.Path]]:
    return [("old", options.old), ("new", options.new)]


def listed(framework: str, quick: bool) -> list[tuple[int, Case]]:
    """List the calls of a framework, numbered: those of the benchmark, and small ones with every option."""
    return list(enumerate(dict.fromkeys([*cases(framework, quick), *small_calls(framework)])))


def measure(
    framework: str,
    wanted: Sequence[tuple[int, Case]],
    folders: Sequence[pathlib.Path],
    options: argparse.Namespace,
    console: Console,
) -> list[Row]:
    """Time calls in so many pairs of processes."""
    rows = [Row(framework, number, case, [], []) for number, case in wanted]
    if not rows:
        return rows
    arguments = (framework, str(int(options.quick)), str(options.threads), str(options.seconds))
    with Progress(console=console) as progress:
        task = progress.add_task(f"{framework}, {len(rows)} rows", total=options.runs * len(rows))
        for run in range(options.runs):
            pair = [
                Worker(folder, "benchmarks.before_after", *arguments, environment=environment(options.memory))
                for folder in folders
            ]
            for row in rows:
                for worker in pair:
                    worker.ask(row.number)
                for worker in pair:
                    worker.answer()
                first = (run + row.number) % 2
                seconds: tuple[list[float], list[float]] = ([], [])
                for turn in (first, 1 - first, 1 - first, first):
                    pair[turn].ask("time")
                    seconds[turn].extend(pair[turn].answer())
                row.old.append(statistics.median(seconds[0]))
                row.new.append(statistics.median(seconds[1]))
                progress.advance(task)
            for worker in pair:
                worker.close()
    return rows


def work(folder: str, framework: str, quick: str, threads: str, seconds: str) -> None:
    """Be one of the two processes: a number prepares that call, "time" says what it takes."""
    call: Any = None

    def respond(question: int | str) -> list[float]:
        nonlocal call
        if question != "time":
            call = None  # its memory first
            call = module.ours(listed(framework, quick == "1")[int(question)][1]).run
            call()
            return []
        call()  # the data is in the other's caches
        taken: list[float] = []
        begin = time.perf_counter()
        while len(taken) < 2 or (time.perf_counter() - begin < float(seconds) and len(taken) < 2000):
            start = time.perf_counter()
            results = call()
            taken.append(time.perf_counter() - start)
            del results
        return taken

    import batchnorm

    from .frameworks import framework as find

    module = find(framework)
    module.configure(int(threads))
    batchnorm.set_num_threads(int(threads))
    answer(respond, folder)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def report(rows: Sequence[Row], options: argparse.Namespace, console: Console) -> float:
    """Print the worst rows and the means; return the mean over all."""
    worst = Table("framework", "shape", "call", "old ms", "new ÷ old", "range", box=box.SIMPLE, title="slowest rows")
    for row in sorted(rows, key=lambda row: -row.ratio)[: options.worst]:
        worst.add_row(
            row.framework,
            row.case.sizes,
            row.case.call,
            f"{statistics.median(row.old) * 1e3:.3g}",
            f"{row.ratio:.3f}{' !' if row.ratio > options.row_limit else ''}",
            f"{min(row.ratios):.2f} to {max(row.ratios):.2f}",
        )
    console.print(worst)
    means = Table("framework", "mode", "rows", "new ÷ old", "range", box=box.SIMPLE, title="geometric means")
    groups = [*dict.fromkeys((row.framework, row.case.mode) for row in rows)]
    for framework, mode in [*groups, ("all", "all")]:
        ratios = [
            row.ratio for row in rows if framework == "all" or (row.framework, row.case.mode) == (framework, mode)
        ]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        means.add_row(framework, mode, str(len(ratios)), f"{geometric_mean(ratios):.3f}", spread)
    console.print(means)
    mean = geometric_mean([row.ratio for row in rows])
    slow = sum(row.ratio > options.row_limit for row in rows)
    console.print(f"{slow} of {len(rows)} rows above {options.row_limit}; mean {mean:.4f}, limit {options.mean_limit}")
    return mean


def write(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Write every row as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for row in rows:
            case = row.case
            times = (f"{statistics.median(side) * 1e3:.4f}" for side in (row.old, row.new))
            ratios = (f"{value:.4f}" for value in (row.ratio, min(row.ratios), max(row.ratios)))
            writer.writerow([row.framework, case.network, case.sizes, case.layout, case.dtype, case.mode, case.option,
                             *times, *ratios, int(row.again)])  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1 and pathlib.Path(sys.argv[1]).is_dir():  # one of the processes, and not a wheel
        work(*sys.argv[1:])
    else:
        sys.exit(main())
