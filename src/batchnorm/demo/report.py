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
from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from .digits import TEST_SIZE
from .experiments import LAST, TARGET, Comparison, Measured, Outcome, Result

__all__ = ["Progress", "announce", "draw", "facts", "show"]

COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "no batch norm": "#6b6b6b",
        "batch norm": "#0072b2",
        "batch renorm": "#d55e00",
        "virtual batches of 16": "#009e73",
        "adjustment": "#aa4499",
        "synchronized": "#009e73",
        "synchronized renorm": "#aa4499",
    }
)
"""One for each method, told apart also by the colour-blind (Okabe and Ito; Tol)."""

_INK = "#333333"
_GRID = "#e4e4e4"
_PERCENT = f"{TARGET:.0%}".replace("%", " %")


def announce(comparisons: Sequence[Comparison], seeds: int, framework: str) -> None:
    """Say what is about to be run."""
    runs = _runs(comparisons, seeds)
    times = "once" if seeds == 1 else f"with {seeds} seeds"
    _console().print(f"Training {runs} networks on {framework}: {runs // seeds} experiments, each {times}.")


def _runs(comparisons: Sequence[Comparison], seeds: int) -> int:
    return seeds * sum(len(comparison.experiments) for comparison in comparisons)


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
        self._all = self._bars.add_task("[bold]All", total=_runs(comparisons, seeds), unit="runs")
        self._tasks = {}
        for comparison in comparisons:
            steps = seeds * sum(experiment.steps for experiment in comparison.experiments)
            self._tasks[comparison] = self._bars.add_task(comparison.title, total=steps, unit="steps")

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
    seeds = len(results[0].outcomes[0].curves)
    over = "a single run" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
    console.print(_table(results))
    console.print(
        f"Accuracy in inference on {TEST_SIZE} scans; {over}.\n"
        f"Mean: over all evaluations of a run. Final: over its last {LAST}.\n",
        style="dim",
    )
    grid = Table.grid(padding=(0, 1))
    for fact in facts(results):
        grid.add_row("•", fact)
    console.print(grid)
    console.print()


def _console() -> Console:
    return Console(highlight=False)


def _table(results: Sequence[Result]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in (f"Steps to {_PERCENT}", "Mean", "Final"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(result.comparison.title, style="bold")
        for outcome in result.outcomes:
            table.add_row(f"  {outcome.experiment.method}", _arrival(outcome), str(outcome.mean), str(outcome.final))
    return table


def _arrival(outcome: Outcome) -> str:
    """Say after how many steps the target was reached."""
    if outcome.steps_to_target is not None:
        return format(outcome.steps_to_target, ".0f")
    if not outcome.arrivals:
        return "never"
    return f"{len(outcome.arrivals)} of {len(outcome.curves)} runs"


def facts(results: Sequence[Result]) -> list[str]:
    """Put what was measured into sentences; nothing is said that the numbers do not."""
    sentences = _sweep_facts([result for result in results if result.comparison.sweep])
    for result in results:
        if not result.comparison.sweep:
            sentences += [f"{result.comparison.title}: {_against(outcome, result)}" for outcome in result.outcomes[1:]]
    return sentences


def _sweep_facts(sweep: Sequence[Result]) -> list[str]:
    rates = []
    best: dict[str, tuple[Measured, float]] = {}
    for outcomes in zip(*(result.outcomes for result in sweep), strict=True):
        method = outcomes[0].experiment.method
        arrived = [(outcome.steps_to_target, outcome.experiment.learning_rate) for outcome in outcomes]
        reached = [(steps, rate) for steps, rate in arrived if steps is not None]
        rates.append(f"{', '.join(f'{rate:g}' for _, rate in reached) or 'none'} ({method})")
        if reached:
            best[method] = min(reached, key=lambda found: found[0].mean)
    sentences = []
    if rates:
        sentences.append(f"Learning rates at which every run reached {_PERCENT}: {'; '.join(rates)}.")
    if best:
        words = [f"{steps:.0f} ({method}, learning rate {rate:g})" for method, (steps, rate) in best.items()]
        sentences.append(f"Fewest steps to {_PERCENT}: {'; '.join(words)}.")
    if len(best) == 2:
        (first, (slow, _)), (second, (fast, _)) = best.items()
        sentences.append(
            f"At the best rate of each, {first} takes {slow.mean / fast.mean:.1f} times the steps of {second}."
        )
    return sentences


def _against(outcome: Outcome, result: Result) -> str:
    """Compare an experiment with the first one."""
    reference = result.outcomes[0]
    mean = _points(result.gain(outcome, lambda curve: curve.mean))
    final = _points(result.gain(outcome, lambda curve: curve.final))
    return f"{outcome.experiment.method} against {reference.experiment.method}: mean {mean}, final {final}."


def _points(gain: Measured) -> str:
    """A difference of accuracies in percentage points, and whether it stands out from its spread."""
    # Rounded, and 0 added, so that no "-0.0" is shown.
    points = Measured(round(100 * gain.mean, 1) + 0.0, None if gain.spread is None else 100 * gain.spread)
    within = gain.spread is not None and abs(gain.mean) <= gain.spread
    return f"{points:+.1f} points" + (" (within the spread)" if within else "")


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
    if sweep:
        panels.insert(place, (f"Steps to {_PERCENT}, by learning rate", lambda axes: _sweep(axes, sweep)))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10.6, 3.4 * rows + 0.3), dpi=150, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.06, h_pad=0.08)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels, strict=False):
        _style(axes, title)
        panel(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    seeds = len(results[0].outcomes[0].curves)
    figure.supxlabel(
        f"Lines: mean of {seeds} seeds (by learning rate, median). Bands: lowest to highest. Dots: single runs."
        if seeds > 1
        else "Single runs.",
        fontsize=8,
        color="#777777",
    )
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
        ends.append((float(accuracy[:, -1].mean()), outcome.experiment.method))
    axes.set_yscale("function", functions=(_stretch, _shrink))
    axes.set_ylim(0.0, 0.996)
    axes.set_yticks([0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99], ["10 %", "50 %", "80 %", "90 %", "95 %", "98 %", "99 %"])
    axes.set_yticks([], minor=True)
    axes.axhline(TARGET, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, result.outcomes[0].curves[0].steps[-1])
    axes.set_xlabel(f"steps at learning rate {result.outcomes[0].experiment.learning_rate:g}", fontsize=8, color=_INK)
    axes.set_ylabel("test accuracy", fontsize=8, color=_INK)
    low, high = (float(value) for value in _stretch(axes.get_ylim()))
    _label(axes, [((float(_stretch(end)) - low) / (high - low), name) for end, name in ends])


def _stretch(accuracy: Any) -> Any:
    """Spread out the accuracies near 1: equal distances are equal ratios of the error."""
    return -np.log10(np.maximum(1.0 - np.asarray(accuracy), 1e-3))


def _shrink(value: Any) -> Any:
    return 1.0 - 10.0 ** -np.asarray(value)


def _label(axes: Axes, ends: Sequence[tuple[float, str]]) -> None:
    """Write the names of lines at the right, where the lines end at parts of the height, but clear of each other."""
    gap = 0.065
    heights, names = map(list, zip(*sorted(ends), strict=True))
    for _ in range(100):
        for index in range(len(heights) - 1):
            overlap = gap - (heights[index + 1] - heights[index])
            if overlap > 0:
                heights[index] -= overlap / 2
                heights[index + 1] += overlap / 2
    for height, name in zip(heights, names, strict=True):
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
    _label(axes, [(end / (1.2 * limit), name) for end, name in ends])
