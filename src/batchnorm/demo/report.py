"""What is shown: progress, a table, the facts measured, and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import progress as bars
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from .experiments import LAST, TARGET, Comparison, Measured, Outcome, Result

__all__ = ["Progress", "announce", "draw", "facts", "show"]

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "no batch norm": "#6b6b6b",
        "batch norm": "#0072b2",
        "batch renorm": "#d55e00",
        "virtual batches of 16": "#009e73",
        "adjustment": "#aa4499",
    }
)
"""One for each method, told apart also by the colour-blind (Okabe and Ito; Tol)."""

_INK = "#333333"
_GRID = "#e4e4e4"
_PERCENT = f"{TARGET:.0%}".replace("%", " %")


def announce(comparisons: Sequence[Comparison], seeds: int) -> None:
    """Say what is about to be run."""
    runs = seeds * sum(len(one.experiments) for one in comparisons)
    times = "once" if seeds == 1 else f"with {seeds} seeds"
    _console().print(f"Training {runs} networks: {runs // seeds} experiments, each {times}.")


class Progress:
    """Progress bars: one for all runs, and one of steps for each comparison. Any thread may move them.

    Args:
        comparisons: What is run.
        seeds: How often each experiment is run.
    """

    def __init__(self, comparisons: Sequence[Comparison], seeds: int) -> None:
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
            bars.TimeElapsedColumn(),
            console=_console(),
            transient=True,
        )
        runs = seeds * sum(len(one.experiments) for one in comparisons)
        self._all = self._bars.add_task("[bold]All", total=runs, unit="runs")
        self._tasks = {
            one: self._bars.add_task(one.title, total=seeds * sum(each.steps for each in one.experiments), unit="steps")
            for one in comparisons
        }

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def advance(self, comparison: Comparison, steps: int) -> None:
        """Count steps of a run."""
        self._bars.advance(self._tasks[comparison], steps)

    def finish(self) -> None:
        """Count a run."""
        self._bars.advance(self._all)


def show(results: Sequence[Result]) -> None:
    """Print the table and the facts under it."""
    console = _console()
    console.print()
    console.print(_table(results))
    seeds = len(results[0].outcomes[0].curves)
    over = "of a single run" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    console.print(
        f"Test accuracy on 500 scans, in inference; {over}. Final: mean of the last {LAST} evaluations.\n", style="dim"
    )
    for fact in facts(results):
        console.print(Padding(fact, (0, 0, 0, 2)))
    console.print()


def _console() -> Console:
    return Console(highlight=False)


def _table(results: Sequence[Result]) -> Table:
    table = Table(header_style="bold")
    table.add_column("Comparison")
    table.add_column("Method")
    table.add_column(f"Steps to {_PERCENT}", justify="right")
    table.add_column("Final accuracy", justify="right")
    for result in results:
        for index, outcome in enumerate(result.outcomes):
            title = result.comparison.title if index == 0 else ""
            table.add_row(title, outcome.experiment.method, _arrival(outcome), str(outcome.final))
        table.add_section()
    return table


def _arrival(outcome: Outcome) -> str:
    """Say after how many steps the target was reached."""
    if outcome.steps_to_target is not None:
        return format(outcome.steps_to_target, ".0f")
    if not outcome.arrivals:
        return "never"
    return f"{len(outcome.arrivals)} of {len(outcome.curves)} runs"


# Facts.


def facts(results: Sequence[Result]) -> list[str]:
    """Put what was measured into sentences; nothing is said that the numbers do not."""
    sweep = [result for result in results if result.comparison.sweep]
    sentences = _sweep_facts(sweep) if sweep else []
    for result in results:
        if not result.comparison.sweep:
            reference, *others = result.outcomes
            sentences += [f"{result.comparison.title}: {_against(other, reference)}" for other in others]
    return sentences


def _sweep_facts(sweep: Sequence[Result]) -> list[str]:
    sentences = []
    best: dict[str, tuple[Measured, float]] = {}
    for outcomes in zip(*(result.outcomes for result in sweep), strict=True):
        method = outcomes[0].experiment.method
        arrived = [(one.steps_to_target, one.experiment.learning_rate) for one in outcomes]
        reached = [(steps, rate) for steps, rate in arrived if steps is not None]
        rates = ", ".join(f"{rate:g}" for _, rate in reached) or "none"
        sentences.append(f"Learning rates at which every run with {method} reached {_PERCENT}: {rates}.")
        if reached:
            best[method] = min(reached, key=lambda one: one[0].mean)
    if best:
        words = [f"{steps:.0f} with {method} (learning rate {rate:g})" for method, (steps, rate) in best.items()]
        sentences.append(f"Fewest steps to {_PERCENT}: {', '.join(words)}.")
    return sentences


def _against(outcome: Outcome, reference: Outcome) -> str:
    """Compare two experiments."""
    gain = outcome.gain(reference)
    points = Measured(100 * gain.mean, None if gain.spread is None else 100 * gain.spread)
    within = ", no more than it varies" if gain.spread is not None and abs(gain.mean) <= gain.spread else ""
    methods = f"{outcome.experiment.method} against {reference.experiment.method}"
    steps = f"{_arrival(outcome)} against {_arrival(reference)}"
    return f"{methods}: final accuracy {points:+.1f} points{within}; steps to {_PERCENT}: {steps}."


# The figure.


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the curves of the comparisons, and the steps to the target by learning rate, as a PNG."""
    sweep = [result for result in results if result.comparison.sweep]
    drawn = [result for result in results if result.comparison.drawn]
    panels: list[tuple[str, Callable[[Axes], None]]] = [
        (result.comparison.title, lambda axes, result=result: _curves(axes, result))  # type: ignore[misc]
        for result in drawn
    ]
    place = sum(result.comparison.sweep for result in drawn)
    panels.insert(place, (f"Steps to {_PERCENT}, by learning rate", lambda axes: _sweep(axes, sweep)))
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10.6, 3.5 * rows), dpi=150, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels, strict=False):
        _style(axes, title)
        panel(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, format="png")
    _console().print(f"Figure: {path}")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=_INK, labelsize=8, length=3)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _curves(axes: Axes, result: Result) -> None:
    """Accuracy by step: the mean over seeds, and a band from the lowest to the highest."""
    ends = []
    for outcome in result.outcomes:
        colour = COLOURS[outcome.experiment.method]
        steps = outcome.curves[0].steps
        accuracy = np.array([curve.accuracy for curve in outcome.curves])
        axes.fill_between(steps, accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, accuracy.mean(axis=0), color=colour, linewidth=1.6)
        ends.append((outcome.final.mean, outcome.experiment.method))
    axes.set_yscale("function", functions=(_stretch, _shrink))
    axes.set_ylim(0.0, 0.996)
    axes.set_yticks([0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99], ["10 %", "50 %", "80 %", "90 %", "95 %", "98 %", "99 %"])
    axes.set_yticks([], minor=True)
    axes.axhline(TARGET, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, result.outcomes[0].curves[0].steps[-1])
    axes.set_xlabel("steps", fontsize=8, color=_INK)
    axes.set_ylabel("test accuracy", fontsize=8, color=_INK)
    _label(axes, ends)


def _stretch(accuracy: Any) -> Any:
    """Spread out the accuracies near 1: equal distances are equal ratios of the error."""
    return -np.log10(np.maximum(1.0 - np.asarray(accuracy), 1e-3))


def _shrink(value: Any) -> Any:
    return 1.0 - 10.0 ** -np.asarray(value)


def _label(axes: Axes, ends: Sequence[tuple[float, str]]) -> None:
    """Write the names of lines at the right, in the order of their ends and clear of each other."""
    gap = 0.07
    low, high = (float(value) for value in _stretch(axes.get_ylim()))
    placed: list[tuple[float, str]] = []
    for end, name in sorted(ends):
        height = (float(_stretch(end)) - low) / (high - low)
        placed.append((max(height, placed[-1][0] + gap) if placed else height, name))
    for height, name in placed:
        axes.text(1.02, height, name, color=COLOURS[name], transform=axes.transAxes, fontsize=8, va="center")


def _sweep(axes: Axes, sweep: Sequence[Result]) -> None:
    """Steps to the target by learning rate: a dot for each run, and a line through the medians."""
    limit = max((outcome.experiment.steps for result in sweep for outcome in result.outcomes), default=1)
    never = 1.15 * limit
    ends = []
    for outcomes in zip(*(result.outcomes for result in sweep), strict=True):
        colour = COLOURS[outcomes[0].experiment.method]
        medians = []
        for outcome in outcomes:
            steps = [never if step is None else step for step in (curve.reached() for curve in outcome.curves)]
            rates = [outcome.experiment.learning_rate] * len(steps)
            axes.scatter(rates, steps, s=14, color=colour, alpha=0.6, linewidths=0, clip_on=False, zorder=3)
            medians.append((rates[0], statistics.median_high(steps)))
        axes.plot(*zip(*medians, strict=True), color=colour, linewidth=1.6)
        ends.append((medians[-1][1], outcomes[0].experiment.method))
    axes.set_xscale("log")
    rates = [result.outcomes[0].experiment.learning_rate for result in sweep]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.2 * limit)
    ticks = [limit * part // 4 for part in range(5)]
    axes.set_yticks([*ticks, never], [*map(str, ticks), "never"])
    axes.set_xlabel("learning rate", fontsize=8, color=_INK)
    axes.set_ylabel("steps", fontsize=8, color=_INK)
    for end, name in ends:
        axes.text(
            1.02, end / (1.2 * limit), name, color=COLOURS[name], transform=axes.transAxes, fontsize=8, va="center"
        )
