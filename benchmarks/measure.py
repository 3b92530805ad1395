"""Measuring: contenders take turns in random order, medians count, results are compared, peaks of memory are read."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pathlib
import statistics
import time

import numpy as np

from .cases import Case
from .frameworks import Contender, Framework

__all__ = ["check", "peak_megabytes", "times"]

TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 4e-2}


def times(contenders: list[Contender], seconds: float, least: int = 7, most: int = 200) -> list[float]:
    """Median seconds of each contender over repetitions in which they take turns.

    The order is drawn anew for each, since what ran before leaves its data in the caches.
    """
    for contender in contenders:
        contender.run()
        contender.run()
    order = np.random.default_rng(0)
    taken: list[list[float]] = [[] for _ in contenders]
    begin = time.perf_counter()
    while len(taken[0]) < least or (time.perf_counter() - begin < seconds and len(taken[0]) < most):
        for turn in order.permutation(len(contenders)):
            start = time.perf_counter()
            results = contenders[turn].run()
            taken[turn].append(time.perf_counter() - start)
            del results
    return [statistics.median(own) for own in taken]


def check(case: Case, contenders: list[Contender], framework: Framework) -> None:
    """Raise unless all contenders give the same results on the same data, the first time they are called."""
    expected = [framework.array(one) for one in contenders[0].run()]
    for contender in contenders[1:]:
        for value, other in zip(contender.run(), expected, strict=True):
            one = framework.array(value)
            if contender.rows is not None and one.shape == case.shape:
                one = one[contender.rows]
            largest = max(1.0, float(np.max(np.abs(other))))
            worst = float(np.max(np.abs(one - other.reshape(one.shape))))
            if not worst <= TOLERANCE[case.dtype] * contender.tolerance * largest:
                raise AssertionError(f"{contender.name} differs by {worst} of {largest} at {case}")


def peak_megabytes(contender: Contender) -> float | None:
    """How far one call raises the memory of this process; None where the system does not tell."""
    reset, status = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # what is free goes back, where the C library can do so
        ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")  # forget the peak so far
        before = _kilobytes(status.read_text(), "VmRSS")
        results = contender.run()
        after = _kilobytes(status.read_text(), "VmHWM")
        del results
    except OSError:
        return None
    return (after - before) / 1e3


def _kilobytes(status: str, key: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(key))
