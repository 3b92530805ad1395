"""Measuring: contenders take turns, medians count, results are compared, and peaks of memory are read."""

from __future__ import annotations

import gc
import pathlib
import statistics
import time

import tensorflow as tf

from .cases import Case
from .contenders import Contender

__all__ = ["check", "peak_megabytes", "times"]

TOLERANCE = {"float32": 1e-3, "bfloat16": 4e-2}


def times(contenders: list[Contender], seconds: float, least: int = 7, most: int = 200) -> list[float]:
    """Median seconds of each contender over repetitions in which they take turns."""
    for contender in contenders:
        contender.run()
        contender.run()
    taken: list[list[float]] = [[] for _ in contenders]
    begin = time.perf_counter()
    while len(taken[0]) < least or (time.perf_counter() - begin < seconds and len(taken[0]) < most):
        for contender, own in zip(contenders, taken, strict=True):
            start = time.perf_counter()
            results = contender.run()
            own.append(time.perf_counter() - start)
            del results
    return [statistics.median(own) for own in taken]


def check(case: Case, contenders: list[Contender]) -> None:
    """Raise unless all contenders give the same results on the same data.

    Keras' layer counts its steps differently, but the outputs of training do not depend on that.
    """
    expected = [tf.cast(one, tf.float32) for one in contenders[0].run()]
    for contender in contenders[1:]:
        for one, other in zip(contender.run(), expected, strict=True):
            largest = max(1.0, float(tf.reduce_max(tf.abs(other))))
            worst = float(tf.reduce_max(tf.abs(tf.cast(one, tf.float32) - tf.reshape(other, one.shape))))
            if not worst <= TOLERANCE[case.dtype] * largest:
                raise AssertionError(f"{contender.name} differs by {worst} of {largest} at {case}")


def peak_megabytes(contender: Contender) -> float | None:
    """How far one call raises the memory of this process; None where the system does not tell."""
    reset, status = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")
    gc.collect()
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
