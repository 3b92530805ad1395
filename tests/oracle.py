"""The whole layer once more, in float64 and with plain loops over samples and features: slow, and easy to check.

NumPy only stores and indexes here. Statistics and parameters are kept by feature, a tuple with one index per feature
axis, so that no line depends on the shapes that a checkpoint needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feature = tuple[int, ...]
Index = tuple[int, ...]
Moments = dict[tuple[int, Feature], tuple[float, float]]
"""Mean and biased variance by (group, feature)."""
Corrections = dict[Feature, tuple[float, float]]
"""Batch renormalization's r and d by feature."""
Pair = tuple[Array, Array]
"""An adjustment: scale and bias."""


@dataclasses.dataclass
class Oracle:
    """One layer. `variables` holds an array of shape `sizes` for every variable, by name.

    `bessel` stores n/(n - 1) times the variance, as the original does where it takes its fused path.
    """

    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    variables: dict[str, Array]
    momentum: float = 0.99
    epsilon: float = 1e-3
    renorm: bool = False
    rmin: float | None = None
    rmax: float | None = None
    dmax: float | None = None
    renorm_momentum: float = 0.99
    virtual_batch_size: int | None = None
    adjustment: Callable[[tuple[int, ...]], tuple[Any, Any]] | None = None
    bessel: bool = False

    @classmethod
    def build(
        cls,
        shape: tuple[int, ...],
        axis: int | tuple[int, ...] = -1,
        *,
        center: bool = True,
        scale: bool = True,
        renorm: bool = False,
        initial: Mapping[str, Array | float] | None = None,
        **options: Any,
    ) -> Oracle:
        """Make the layer for inputs of a shape; `initial` may hold gamma, beta, moving_mean and moving_variance."""
        given = axis if isinstance(axis, tuple) else (axis,)
        axes = tuple(sorted(one + len(shape) if one < 0 else one for one in given))
        sizes = tuple(shape[one] for one in axes)
        start = {"gamma": 1.0, "beta": 0.0, "moving_mean": 0.0, "moving_variance": 1.0, **(initial or {})}
        variables = {}
        for name, value in start.items():
            if (name == "gamma" and not scale) or (name == "beta" and not center):
                continue
            variables[name] = np.empty(sizes)
            flat = np.asarray(value, np.float64).reshape(-1)
            for position, feature in enumerate(np.ndindex(*sizes)):
                variables[name][feature] = flat[position if len(flat) > 1 else 0]
        if renorm:
            variables["renorm_mean"] = variables["moving_mean"].copy()
            for name in ("moving_stddev", "renorm_stddev"):
                variables[name] = np.empty(sizes)
                for feature in np.ndindex(*sizes):
                    variables[name][feature] = math.sqrt(variables["moving_variance"][feature])
        return cls(sizes, axes, variables, renorm=renorm, **options)

    def parameter_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of every variable in a checkpoint."""
        if len(self.axes) == 1 and self.virtual_batch_size is None:
            return self.sizes
        shape = [1] * rank
        for axis, size in zip(self.axes, self.sizes, strict=True):
            shape[axis] = size
        if self.virtual_batch_size is not None:
            shape.insert(1, 1)
        return tuple(shape)

    def train(self, x: Array) -> Array:
        """Take one training step and return the output."""
        adjustment = self.adjust(x.shape)
        moments = self.moments(x)
        averages = self.averages(moments)
        y = self.output(x, self.corrections(averages), adjustment)
        self._update(averages, x)
        return y

    def infer(self, x: Array) -> Array:
        """Return the output of inference."""
        y = np.empty(x.shape)
        for index in np.ndindex(*x.shape):
            feature = self._feature(index)
            mean = self.variables["moving_mean"][feature]
            variance = self.variables["moving_variance"][feature]
            y[index] = self._scale_and_center((float(x[index]) - mean) / math.sqrt(variance + self.epsilon), feature)
        return y

    def moments(self, x: Array) -> Moments:
        """Mean and biased variance of every group and feature that has values."""
        values: dict[tuple[int, Feature], list[float]] = {}
        for index in np.ndindex(*x.shape):
            values.setdefault((self._group(index, x), self._feature(index)), []).append(float(x[index]))
        moments = {}
        for key, some in values.items():
            mean = math.fsum(some) / len(some)
            moments[key] = (mean, math.fsum((value - mean) ** 2 for value in some) / len(some))
        return moments

    def averages(self, moments: Moments) -> dict[Feature, tuple[float, float]]:
        """The means over the groups of their means and of their variances."""
        by_feature: dict[Feature, list[tuple[float, float]]] = {}
        for (_, feature), pair in moments.items():
            by_feature.setdefault(feature, []).append(pair)
        return {
            feature: (
                math.fsum(mean for mean, _ in pairs) / len(pairs),
                math.fsum(variance for _, variance in pairs) / len(pairs),
            )
            for feature, pairs in by_feature.items()
        }

    def corrections(self, averages: Mapping[Feature, tuple[float, float]]) -> Corrections:
        """Batch renormalization's r and d from the averages of before this step; 1 and 0 without it."""
        if not self.renorm:
            return dict.fromkeys(averages, (1.0, 0.0))
        corrections = {}
        for feature, (mean, variance) in averages.items():
            s = max(float(self.variables["renorm_stddev"][feature]), math.sqrt(self.epsilon))
            r = math.sqrt(variance + self.epsilon) / s
            d = (mean - float(self.variables["renorm_mean"][feature])) / s
            if self.rmin is not None and r < self.rmin:
                r = self.rmin
            if self.rmax is not None and r > self.rmax:
                r = self.rmax
            if self.dmax is not None and d < -self.dmax:
                d = -self.dmax
            if self.dmax is not None and d > self.dmax:
                d = self.dmax
            corrections[feature] = (r, d)
        return corrections

    def adjust(self, shape: tuple[int, ...]) -> Pair | None:
        """What the adjustment returns for inputs of a shape."""
        if self.adjustment is None:
            return None
        scale, bias = self.adjustment(shape)
        return np.asarray(scale, np.float64), np.asarray(bias, np.float64)

    def output(self, x: Array, corrections: Corrections, adjustment: Pair | None) -> Array:
        """The output of training, where r and d are given and thus constant, as they are to the gradient."""
        moments = self.moments(x)
        y = np.empty(x.shape)
        for index in np.ndindex(*x.shape):
            feature = self._feature(index)
            mean, variance = moments[self._group(index, x), feature]
            r, d = corrections[feature]
            value = (float(x[index]) - mean) / math.sqrt(variance + self.epsilon) * r + d
            if adjustment is not None:
                scale, bias = adjustment
                value = value * broadcast(scale, index) + broadcast(bias, index)
            y[index] = self._scale_and_center(value, feature)
        return y

    def _update(self, averages: Mapping[Feature, tuple[float, float]], x: Array) -> None:
        for feature, (mean, variance) in averages.items():
            sigma = math.sqrt(variance + self.epsilon)
            self._move("moving_mean", feature, mean, self.momentum)
            if self.renorm:
                self._move("renorm_mean", feature, mean, self.renorm_momentum)
                self._move("renorm_stddev", feature, sigma, self.renorm_momentum)
                self._move("moving_stddev", feature, sigma, self.momentum)
                stddev = self.variables["moving_stddev"][feature]
                self.variables["moving_variance"][feature] = max(0.0, stddev * stddev - self.epsilon)
            else:
                count = sum(1 for index in np.ndindex(*x.shape) if self._feature(index) == feature)
                stored = variance * count / (count - 1) if self.bessel and count > 1 else variance
                self._move("moving_variance", feature, stored, self.momentum)

    def _move(self, name: str, feature: Feature, new: float, decay: float) -> None:
        old = float(self.variables[name][feature])
        self.variables[name][feature] = decay * old + (1 - decay) * new

    def _scale_and_center(self, value: float, feature: Feature) -> float:
        if "gamma" in self.variables:
            value = value * float(self.variables["gamma"][feature])
        if "beta" in self.variables:
            value = value + float(self.variables["beta"][feature])
        return value

    def _feature(self, index: Index) -> Feature:
        return tuple(index[axis] for axis in self.axes)

    def _group(self, index: Index, x: Array) -> int:
        if self.virtual_batch_size is None:
            return 0
        groups, left = divmod(x.shape[0], self.virtual_batch_size)
        if left:
            raise ValueError(f"{x.shape[0]} samples do not divide by {self.virtual_batch_size}")
        return int(index[0] % groups)


def broadcast(value: Array, index: Index) -> float:
    """The element of `value` that broadcasting puts at an index of the input."""
    own = index[len(index) - value.ndim :]
    return float(value[tuple(0 if size == 1 else i for i, size in zip(own, value.shape, strict=True))])


def differences(function: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Central finite differences of a function of an array, one element at a time."""
    gradient = np.empty(at.shape)
    for index in np.ndindex(*at.shape):
        values = []
        for sign in (1, -1):
            moved = at.astype(np.float64)
            moved[index] += sign * step
            values.append(function(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient
