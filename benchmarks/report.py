"""What came of it: tables for the terminal and the documents, and a plot of speed against the floor."""

from __future__ import annotations

import csv
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .memory import KEPT, RETURNED, THEIR_OWN

__all__ = ["FIELDS", "PLAIN", "Section", "chosen", "plot", "read", "sections", "update"]

FIELDS = ("network", "shape", "layout", "dtype", "mode", "option", "memory", "megabytes", "kernel", "floor",
          "contender", "milliseconds", "peak_megabytes")  # fmt: skip
MODES = ("forward", "step", "inference")
MEMORY = {KEPT: "memory kept by the process", RETURNED: "memory returned to the system", THEIR_OWN: "its own memory"}

PLAIN = "our plain layer"
"""The contender beside each option of ours."""
CHOSEN = (
    ("pytorch", "plain", "torch.nn", {"layout": "features first"}),
    ("pytorch", "plain", "torch.compile", {"layout": "features first"}),
    ("pytorch", "renorm", "torchrl", {"option": "renorm"}),
    ("tensorflow", "plain", "the original", {"layout": "features last"}),
    ("tensorflow", "virtual batches", "the original", {"option": "virtual batches"}),
    ("jax", "plain", "flax", {"layout": "features last"}),
    ("numpy", "plain", "by hand", {"layout": "features last"}),
)
"""The lines of the README: framework, name, peer, and which rows, of training steps on ResNet-50's shapes."""

Row = dict[str, Any]


class Section(NamedTuple):
    """A table."""

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Write it for a document."""
        rows = (self.head, ("---",) * len(self.head), *self.lines)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def read(path: pathlib.Path) -> tuple[str, list[Row]]:
    """Read what a run has written: the conditions, and the rows."""
    first, *rest = path.read_text().splitlines()
    rows: list[Row] = list(csv.DictReader(rest))
    for row in rows:
        for key in ("megabytes", "floor", "milliseconds"):
            row[key] = float(row[key])
        row["peak_megabytes"] = float(row["peak_megabytes"]) if row["peak_megabytes"] else None
    return first.removeprefix("# "), rows


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("memory", "shape", "layout", "dtype", "mode", "option"))


def _mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def _ours(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    return {_key(row): row for row in rows if row["contender"] == "batchnorm"}


def _faster(rows: Iterable[Row], peer: str) -> list[float]:
    """How many times as fast as a peer we are, case by case."""
    found = list(rows)
    ours = _ours(found)
    return [row["milliseconds"] / ours[_key(row)]["milliseconds"] for row in found if row["contender"] == peer]


def sections(rows: list[Row], peers: Sequence[str]) -> Iterator[Section]:
    """Group the rows, and take geometric means: times as fast as each peer, and time beside plain and the floor."""
    for memory in dict.fromkeys(row["memory"] for row in rows):
        here = [row for row in rows if row["memory"] == memory]
        resnet = [row for row in here if row["network"] == "ResNet-50"]
        others = [row for row in here if row["network"] != "ResNet-50" and row["mode"] in MODES]
        steps = [row for row in others if row["mode"] == "step" and row["dtype"] == "float32"]
        for title, some, names in (
            ("ResNet-50, plain", [row for row in resnet if row["option"] == "plain"], ("layout", "dtype", "mode")),
            ("ResNet-50, float32 steps", [row for row in resnet if row["option"] != "plain"], ("option",)),
            ("other shapes, plain", [row for row in others if row["option"] == "plain"], ("network", "dtype", "mode")),
            ("other shapes, float32 steps", [row for row in steps if row["option"] != "plain"], ("network", "option")),
            ("a step of a whole network", [row for row in here if row["mode"] == "network"], ("network", "layout")),
        ):
            if some:
                yield _section(f"{title}; {MEMORY.get(memory, memory)}", some, names, peers)


def _section(title: str, rows: list[Row], names: tuple[str, ...], peers: Sequence[str]) -> Section:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(", ".join(row[name] for name in names), []).append(row)
    columns: dict[str, Callable[[list[Row]], list[float]]] = {
        f"× {peer}": functools.partial(_faster, peer=peer) for peer in peers
    }

    def beside_plain(some: list[Row]) -> list[float]:
        return [1 / ratio for ratio in _faster(some, PLAIN)]

    def above_floor(some: list[Row]) -> list[float]:
        mine = _ours(some).values()
        return [row["milliseconds"] / row["floor"] for row in mine if row["floor"] and row["megabytes"] > 4]

    columns |= {"÷ plain": beside_plain, "÷ floor": above_floor}
    cells = {name: [function(some) for some in groups.values()] for name, function in columns.items()}
    shown = {name: ratios for name, ratios in cells.items() if any(ratios)}
    lines = [
        (group, *(_cell(ratios[position], name.startswith("×")) for name, ratios in shown.items()))
        for position, group in enumerate(groups)
    ]
    return Section(title, ("", *shown), lines)


def _cell(ratios: list[float], spread: bool) -> str:
    if not ratios:
        return ""
    return f"{_mean(ratios):.2f}" + (f" ({min(ratios):.2f} to {max(ratios):.2f})" if spread and len(ratios) > 1 else "")


def chosen(results: Mapping[str, list[Row]], titles: Mapping[str, str]) -> Section:
    """Make the short table, from the rows of each framework that has been measured."""
    lines = []
    for framework, name, peer, wanted in CHOSEN:
        usual = {"network": "ResNet-50", "mode": "step", "option": "plain", "dtype": "float32"} | wanted
        rows = [row for row in results.get(framework, ()) if all(row[key] == usual[key] for key in usual)]
        cells = []
        for memories in ((KEPT, THEIR_OWN), (RETURNED,)):
            own = [row for row in rows if row["memory"] in memories]
            cells.append(_cell(_faster(own, peer), spread=True))
        if any(cells):
            lines.append((titles[framework], name, peer, *cells))
    return Section("", ("", "training step", "beside", "× as fast, memory kept", "× as fast, returned"), lines)


def update(path: pathlib.Path, mark: str, text: str) -> None:
    """Put a text between the marks of a document."""
    before = path.read_text()
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    head, rest = before.split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def plot(rows: list[Row], title: str, peers: Iterable[str], path: pathlib.Path) -> None:
    """Draw the time of training steps as a multiple of the floor, by size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    memory = rows[0]["memory"]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    looks = (("#0072B2", "o"), ("#666666", "s"), ("#D55E00", "^"))  # of two peers at most
    styles = dict(zip(("batchnorm", *peers), looks, strict=False))
    for panel, layout in zip(axes, ("features last", "features first"), strict=True):
        for contender, (color, marker) in styles.items():
            chosen = sorted(
                (row["megabytes"], row["milliseconds"] / row["floor"])
                for row in rows
                if (row["contender"], row["layout"], row["dtype"], row["mode"], row["option"], row["memory"])
                == (contender, layout, "float32", "step", "plain", memory)
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
    figure.suptitle(f"Plain batch normalization, float32, {title} on the CPU, memory {memory}; 1 is the floor")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
