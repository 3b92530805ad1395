"""NumPy: our layer, and what a careful programmer writes in NumPy: two passes for the moments, sums in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import batchnorm.numpy
from benchmarks.cases import Case

from . import Array, Contender

__all__ = ["KEEPS_MEMORY", "PEERS", "TITLE", "array", "configure", "contenders", "extras", "ours", "versions"]

TITLE = "NumPy"
KEEPS_MEMORY = False
PEERS = ("by hand",)


def configure(threads: int) -> None:
    """Do nothing: NumPy's element-wise operations and sums have one thread."""


def versions() -> str:
    """Name NumPy with its version."""
    return f"NumPy {np.__version__} (one thread)"


def array(value: Any) -> Array:
    """Return a result as it is."""
    return np.asarray(value)


@functools.lru_cache(maxsize=2)  # cases of one shape follow each other
def _data(shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    x, dy = (random.standard_normal(shape, np.float32).astype(dtype) for _ in range(2))
    return x * 2 + 0.5, dy


def _options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {"axis": case.axis}
    if "renorm" in case.option:
        options |= {"renorm": True, "renorm_clipping": {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}}
    if "virtual" in case.option:
        size = min(8, case.shape[0])
        options["virtual_batch_size"] = size - 1 if "uneven" in case.option else size
    if case.option == "adjustment":
        scale = np.linspace(0.93, 1.07, case.shape[case.axis], dtype=case.dtype)
        scale = scale.reshape([-1 if axis == case.axis % len(case.shape) else 1 for axis in range(len(case.shape))])
        options["adjustment"] = lambda shape: (scale, scale - 1)
    if case.option == "two axes":
        options["axis"] = [1, 2] if case.axis == -1 else [1, len(case.shape) - 1]
    return options


def _run(layer: Any, case: Case, x: Array, dy: Array) -> Callable[[], list[Any]]:
    given = {} if case.mask is None else {"mask": case.mask}

    def step() -> list[Any]:
        y, gradient = layer.vjp(x, training=True, **given)
        inputs, gamma, beta, _ = gradient(dy)
        return [y, inputs, gamma, beta]

    return step if case.mode == "step" else lambda: [layer(x, training=case.mode == "forward")]


class _ByHand:
    """Plain batch normalization in NumPy."""

    def __init__(self, shape: tuple[int, ...], axis: int, dtype: str) -> None:
        features = [size if position == axis % len(shape) else 1 for position, size in enumerate(shape)]
        self.axes = tuple(position for position in range(len(shape)) if position != axis % len(shape))
        self.gamma, self.moving_variance = np.ones(features, dtype), np.ones(features, dtype)
        self.beta, self.moving_mean = np.zeros(features, dtype), np.zeros(features, dtype)

    def _mean(self, x: Array) -> Array:
        mean: Array = x.mean(axis=self.axes, keepdims=True, dtype=np.float64)
        return mean.astype(x.dtype)

    def __call__(self, x: Array, training: bool) -> Array:
        if training:
            return self.vjp(x, training)[0]
        y: Array = x - self.moving_mean
        y *= self.gamma / np.sqrt(self.moving_variance + 1e-3)
        y += self.beta
        return y

    def vjp(self, x: Array, training: bool) -> tuple[Array, Callable[[Array], tuple[Any, ...]]]:
        mean = self._mean(x)
        normalized = x - mean
        variance = self._mean(np.square(normalized))
        inverse = 1 / np.sqrt(variance + x.dtype.type(1e-3))
        normalized *= inverse
        self.moving_mean += (mean - self.moving_mean) * x.dtype.type(0.01)
        self.moving_variance += (variance - self.moving_variance) * x.dtype.type(0.01)
        y = normalized * self.gamma
        y += self.beta

        def gradient(dy: Array) -> tuple[Any, ...]:
            count = x.size / self.gamma.size
            product = normalized * dy
            dbeta, dgamma = self._mean(dy), self._mean(product)
            dx = np.multiply(normalized, -dgamma, out=product)
            dx += dy
            dx -= dbeta
            dx *= self.gamma * inverse
            return dx, dgamma * count, dbeta * count, None

        return y, gradient


def ours(case: Case) -> Contender:
    """Make our layer on the data of a case."""
    layer = batchnorm.numpy.BatchNormalization(**_options(case))
    return Contender("batchnorm", _run(layer, case, *_data(case.shape, case.dtype)), lambda: layer.kernel)


def contenders(case: Case) -> tuple[list[Contender], Contender]:
    """Make the contenders of a case, ours first, and the floor: what reading and writing the data takes alone."""
    x, dy = _data(case.shape, case.dtype)
    found = [ours(case)]
    if case.option == "plain":
        found.append(Contender("by hand", _run(_ByHand(case.shape, case.axis, case.dtype), case, x, dy)))

    def floor() -> list[Any]:  # a copy; and for the gradient, two read and one written
        return [-x, x + dy] if case.mode == "step" else [-x]

    return found, Contender("floor", floor)


def extras(quick: bool) -> list[tuple[Case, list[Contender]]]:
    """Make what is measured besides single layers: nothing."""
    return []
