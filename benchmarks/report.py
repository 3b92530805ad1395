"""What came of it: a table for the terminal and for the README, and a plot of speed against the floor."""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["FIELDS", "headings", "plot", "read", "summary", "update_readme"]

FIELDS = ("network", "shape", "layout", "dtype", "mode", "option", "megabytes", "kernel", "floor", "contender",
          "milliseconds", "peak_megabytes")  # fmt: skip

Row = dict[str, Any]


def read(path: pathlib.Path) -> list[Row]:
    """Read what a run has written."""
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for key in ("megabytes", "floor", "milliseconds"):
            row[key] = float(row[key])
        row["peak_megabytes"] = float(row["peak_megabytes"]) if row["peak_megabytes"] else None
    return rows


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "layout", "dtype", "mode", "option"))


def _mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def headings(peers: Iterable[str]) -> tuple[str, ...]:
    """Name the columns of the table."""
    return ("shapes", *(f"× {peer}" for peer in peers), "time ÷ our plain", "time ÷ floor, above 4 MB", "cases")


def summary(rows: list[Row], peers: Iterable[str]) -> list[tuple[str, ...]]:
    """Geometric means of ratios by group: how many times faster than each peer, and how far from plain and floor."""
    ours = {_key(row): row for row in rows if row["contender"] == "batchnorm"}
    plain = {key[:4]: row for key, row in ours.items() if key[4] == "plain"}
    lines: list[tuple[str, ...]] = []

    def line(title: str, chosen: Callable[[Row], bool]) -> None:
        mine = [row for row in ours.values() if chosen(row)]
        if not mine:
            return
        cells = []
        for peer in peers:
            ratios = [
                row["milliseconds"] / ours[_key(row)]["milliseconds"]
                for row in rows
                if row["contender"] == peer and chosen(row)
            ]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
            cells.append(f"{_mean(ratios):.2f}{spread}" if ratios else "")
        beside = [
            row["milliseconds"] / plain[_key(row)[:4]]["milliseconds"] for row in mine if row["option"] != "plain"
        ]
        above = [row["milliseconds"] / row["floor"] for row in mine if row["megabytes"] > 4 and row["floor"]]
        lines.append(
            (
                title,
                *cells,
                f"{_mean(beside):.2f}" if beside else "",
                f"{_mean(above):.2f}" if above else "",
                str(len(mine)),
            )
        )

    for layout in ("features last", "features first"):
        for dtype in ("float32", "bfloat16"):
            for mode in ("forward", "step", "inference"):
                line(
                    f"ResNet-50, {layout}, {dtype}, {mode}",
                    lambda row, layout=layout, dtype=dtype, mode=mode: (  # type: ignore[misc]
                        row["network"] == "ResNet-50"
                        and (row["layout"], row["dtype"], row["mode"], row["option"]) == (layout, dtype, mode, "plain")
                    ),
                )
    for layout, option in dict.fromkeys((row["layout"], row["option"]) for row in rows if row["option"] != "plain"):
        line(
            f"ResNet-50, {layout}, float32, step, {option}",
            lambda row, layout=layout, option=option: (  # type: ignore[misc]
                (row["network"], row["layout"], row["option"]) == ("ResNet-50", layout, option)
            ),
        )
    for layout in dict.fromkeys(row["layout"] for row in rows if row["mode"] == "network"):
        line(
            f"ResNet-18, {layout}, a step of the whole network",
            lambda row, layout=layout: (row["mode"], row["layout"]) == ("network", layout),  # type: ignore[misc]
        )
    for network in dict.fromkeys(row["network"] for row in rows if row["network"] != "ResNet-50"):
        for option in dict.fromkeys(row["option"] for row in rows):
            line(
                f"{network}, float32, step, {option}",
                lambda row, network=network, option=option: (  # type: ignore[misc]
                    (row["network"], row["dtype"], row["mode"], row["option"]) == (network, "float32", "step", option)
                ),
            )
    return lines


def update_readme(
    framework: str, head: tuple[str, ...], lines: list[tuple[str, ...]], conditions: str, path: pathlib.Path
) -> None:
    """Put the table between the marks in a document."""
    text = path.read_text()
    mark = f"<!-- benchmark {framework}: begin -->"
    begin = text.index(mark) + len(mark)
    end = text.index(f"<!-- benchmark {framework}: end -->")
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines)]
    path.write_text(f"{text[:begin]}\n{conditions}\n\n" + "\n".join(table) + f"\n{text[end:]}")


def plot(rows: list[Row], title: str, peers: Iterable[str], path: pathlib.Path) -> None:
    """Draw the time of training steps as a multiple of the floor, by size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    styles = dict(
        zip(("batchnorm", *peers), (("#0072B2", "o"), ("#666666", "s"), ("#D55E00", "^")), strict=False)  # two peers
    )
    for panel, layout in zip(axes, ("features last", "features first"), strict=True):
        for contender, (color, marker) in styles.items():
            chosen = sorted(
                (row["megabytes"], row["milliseconds"] / row["floor"])
                for row in rows
                if (row["contender"], row["layout"], row["dtype"], row["mode"], row["option"])
                == (contender, layout, "float32", "step", "plain")
            )
            if chosen:
                x, y = zip(*chosen, strict=True)
                panel.plot(x, y, marker, color=color, label=contender, markersize=6, alpha=0.85)
        panel.axhline(1, color="#999999", linewidth=1)
        panel.set(xscale="log", yscale="log", title=layout, xlabel="size of the input in MB")
        panel.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        panel.minorticks_off()
        panel.grid(axis="y", color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time of a training step ÷ floor")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Plain batch normalization, float32, {title} on the CPU; 1 is reading and writing alone")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
