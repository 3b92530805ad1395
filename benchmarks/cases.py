"""What is measured: the shapes of real networks, and the options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["Case", "cases", "small_calls"]

RESNET50 = (
    *((64, 112), (64, 56), (128, 56), (256, 56), (128, 28), (256, 28), (512, 28)),
    *((256, 14), (512, 14), (1024, 14), (512, 7), (2048, 7)),
)
"""Channels and side of every distinct batch normalization of ResNet-50."""

OTHERS = {
    "tabular": ((8192, 128), -1),
    "small": ((256, 256), -1),
    "tiny": ((64, 16), -1),
    "few channels": ((8, 6, 256, 256), 1),
    "3-D": ((2, 32, 16, 64, 64), 1),
}
OPTIONS = ("renorm", "virtual batches", "renorm + virtual batches", "adjustment", "two axes")
COUNTING = ("mask of ones", "half masked", "uneven virtual batches")
"""What says which values count, where the kernels take it; half masked is all but the first half of each sample."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        network: Where the shape is from.
        shape: Shape of the input.
        axis: The feature axis.
        dtype: Type of the input.
        mode: ``"forward"`` (in training), ``"step"`` (forward and backward) or ``"inference"``; ``"eager step"`` and
            ``"eager inference"`` are without a graph where the framework has one; ``"network"`` is a training step of
            a whole network.
        option: ``"plain"`` or one of `OPTIONS` or `COUNTING`.
    """

    network: str
    shape: tuple[int, ...]
    axis: int
    dtype: str
    mode: str
    option: str = "plain"

    @property
    def megabytes(self) -> float:
        """Size of the input."""
        size = {"bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]
        for side in self.shape:
            size *= side
        return size / 1e6

    @property
    def sizes(self) -> str:
        """The shape in one word."""
        return "x".join(map(str, self.shape))

    @property
    def call(self) -> str:
        """What is called, besides the shape."""
        return ", ".join((self.mode, self.option, self.dtype, self.layout.removeprefix("features ")))

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """What counts, by position; None where that is everything."""
        if "mask" not in self.option:
            return None
        positions = tuple(size for at, size in enumerate(self.shape) if at != self.axis % len(self.shape))
        kept = np.ones(positions, bool)
        if self.option == "half masked":
            rows = kept.reshape(positions[0], -1) if len(positions) > 1 else kept.reshape(2, -1)
            rows[(slice(None), slice(rows.shape[1] // 2, None)) if len(positions) > 1 else 1] = False
        return kept

    @property
    def layout(self) -> str:
        """Where the features are."""
        return "features last" if self.axis == -1 else "features first"


def _shapes(quick: bool) -> Iterator[tuple[str, tuple[int, ...], int]]:
    batch = 4 if quick else 32
    for channels, side in RESNET50:
        yield "ResNet-50", (batch, side, side, channels), -1
        yield "ResNet-50", (batch, channels, side, side), 1
    for name, (shape, axis) in OTHERS.items():
        yield name, shape, axis


def cases(framework: str, quick: bool) -> list[Case]:
    """List every measurement; quick ones have small batches.

    Options are measured in the layout that the framework has by default.
    """
    usual = 1 if framework == "pytorch" else -1
    found = []
    for network, shape, axis in _shapes(quick):
        for dtype in _types(framework, network):
            found += [Case(network, shape, axis, dtype, mode) for mode in ("forward", "step", "inference")]
        if network != "ResNet-50" or axis == usual:
            legal = OPTIONS if len(shape) > 2 else OPTIONS[:-1]
            if framework != "tensorflow":
                legal = (*legal, *COUNTING)
            if framework == "pytorch" and network == "tabular":
                legal = (*legal, "virtual batches of 128")
            found += [Case(network, shape, axis, "float32", "step", option) for option in legal]
    return found


def _types(framework: str, network: str) -> tuple[str, ...]:
    if framework == "numpy":  # which has no bfloat16 of its own
        return ("float32",) if network == "ResNet-50" else ("float32", "float64")
    return "float32", "bfloat16"


def small_calls(framework: str) -> list[Case]:
    """List calls so small that most of their time is Python's or the framework's, with every option."""
    modes = ("step", "inference", *(("eager step", "eager inference") if framework == "tensorflow" else ()))
    return [
        Case(network, *OTHERS[network], "float32", mode, option)
        for network in ("small", "tiny")
        for mode in modes
        for option in ("plain", *OPTIONS[:-1])
    ]
