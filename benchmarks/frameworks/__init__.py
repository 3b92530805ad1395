"""What is measured on each framework: its layers, each as a function of nothing that returns what a user would have."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.cases import Case

__all__ = ["Contender", "Framework", "framework"]

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One layer on the data of a case.

    Attributes:
        name: Whose layer it is.
        run: Computes the case once. Outputs are allocated as the framework does.
        kernel: Says which of our kernels served.
        rows: Where this layer puts the samples that ours has in order, if elsewhere.
        tolerance: How far results may be from ours, as a multiple of what rounding allows.
    """

    name: str
    run: Callable[[], list[Any]]
    kernel: Callable[[], str | None] = lambda: None
    rows: npt.NDArray[np.int64] | None = None
    tolerance: float = 1.0


class Framework(Protocol):
    """A module of this package."""

    TITLE: str
    PEERS: tuple[str, ...]
    KEEPS_MEMORY: bool
    """Whether it keeps the memory of its arrays by itself, so that what the C library does makes no difference."""

    def configure(self, threads: int) -> None:
        """Set the threads that the framework computes with."""

    def versions(self) -> str:
        """Name the framework and the peers with their versions."""

    def ours(self, case: Case) -> Contender:
        """Make our layer on the data of a case."""

    def contenders(self, case: Case) -> tuple[list[Contender], Contender]:
        """Make the contenders of a case, ours first, and the floor: what reading and writing the data takes alone."""

    def array(self, value: Any) -> Array:
        """Copy a result to NumPy."""

    def extras(self, quick: bool) -> list[tuple[Case, list[Contender]]]:
        """Make what is measured besides single layers."""


def framework(name: str) -> Framework:
    """Find the module of a framework; that of Keras has a backend, which is read when it is imported."""
    name, _, backend = name.partition("-")
    if backend:
        os.environ["KERAS_BACKEND"] = backend
    module: Any = importlib.import_module(f".{name}", __name__)
    found: Framework = module
    return found
