"""The whole layer once more, in float64 and with plain loops over samples and features: slow, and easy to check.

NumPy only stores and indexes here. Statistics and parameters are kept by feature, a tuple with one index per feature
axis, so that no line depends on the shapes that a checkpoint needs. Weights are any array that broadcasts to the input;
what has weight 0 is never read into a sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feature = tuple[int, ...]
Index = tuple[int, ...]
Corrections = dict[Feature, tuple[float, float]]
"""Batch renormalization's r and d by feature."""
Pair = tuple[Array, Array]
"""An adjustment: scale and bias."""


class Moments(NamedTuple):
    """Mean, biased variance, and total Σw and Σw² of some values."""

    mean: float
    variance: float
    total: float
    squares: float

    def unbiased(self) -> float:
        """v·n/(n - 1) with n = (Σw)²/Σw², or v for one value and less."""
        n = self.total**2 / self.squares if self.squares else 0.0
        return self.variance * n / (n - 1) if n > 1 else self.variance


Groups = dict[tuple[int, Feature], Moments]
"""Moments by (group, feature)."""


class Gradients(NamedTuple):
    """Gradients for the input, by feature for the parameters, and for what the adjustment returned."""

    x: Array
    gamma: Array
    beta: Array
    adjustment: Pair | None


@dataclasses.dataclass
class Oracle:
    """One layer. `variables` holds an array of shape `sizes` for every variable, by name.

    `bessel` stores the unbiased variance, each group's by its own n, as the original does where it is fused.
    `masked` says what stands at positions of weight 0: the ``"normalized"`` value, or ``"zero"``.
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
    masked: str = "normalized"

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
        axes = tuple(sorted(each + len(shape) if each < 0 else each for each in given))
        sizes = tuple(shape[each] for each in axes)
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

    def train(self, x: Array, weights: Array | None = None) -> Array:
        """Take one training step and return the output."""
        adjustment = self.adjust(x.shape)
        groups = self.moments(x, weights)
        y = self.output(x, self.corrections(self.averages(groups)), adjustment, weights)
        self._update(groups)
        return y

    def infer(self, x: Array, weights: Array | None = None) -> Array:
        """Return the output of inference."""
        y = np.empty(x.shape)
        for index in np.ndindex(*x.shape):
            feature = self._feature(index)
            mean = self.variables["moving_mean"][feature]
            variance = self.variables["moving_variance"][feature]
            y[index] = self._scale_and_center((float(x[index]) - mean) / math.sqrt(variance + self.epsilon), feature)
            if self.masked == "zero" and weight(weights, index) == 0:
                y[index] = 0.0
        return y

    def moments(self, x: Array, weights: Array | None = None) -> Groups:
        """The moments of every group and feature; 0 and 0 where there is nothing but weight 0."""
        values: dict[tuple[int, Feature], list[tuple[float, float]]] = {}
        for index in np.ndindex(*x.shape):
            some = values.setdefault((self._group(index, x), self._feature(index)), [])
            if weight(weights, index) > 0:
                some.append((weight(weights, index), float(x[index])))
        groups = {}
        for key, some in values.items():
            count = math.fsum(w for w, _ in some)
            mean = math.fsum(w * value for w, value in some) / count if some else 0.0
            variance = math.fsum(w * (value - mean) ** 2 for w, value in some) / count if some else 0.0
            groups[key] = Moments(mean, variance, count, math.fsum(w * w for w, _ in some))
        return groups

    def averages(self, groups: Groups, unbiased: bool = False) -> dict[Feature, tuple[float, float]]:
        """The means over the groups of their means and of their variances, weighted by their counts."""
        by_feature: dict[Feature, list[Moments]] = {}
        for (_, feature), moments in groups.items():
            by_feature.setdefault(feature, []).append(moments)
        averages = {}
        for feature, some in by_feature.items():
            count = math.fsum(moments.total for moments in some) or 1.0
            averages[feature] = (
                math.fsum(moments.mean * moments.total for moments in some) / count,
                math.fsum((moments.unbiased() if unbiased else moments.variance) * moments.total for moments in some)
                / count,
            )
        return averages

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

    def output(
        self, x: Array, corrections: Corrections, adjustment: Pair | None, weights: Array | None = None
    ) -> Array:
        """The output of training, where r and d are given and thus constant, as they are to the gradient."""
        groups = self.moments(x, weights)
        y = np.empty(x.shape)
        for index in np.ndindex(*x.shape):
            feature = self._feature(index)
            mean, variance, *_ = groups[self._group(index, x), feature]
            r, d = corrections[feature]
            value = (float(x[index]) - mean) / math.sqrt(variance + self.epsilon) * r + d
            if adjustment is not None:
                scale, bias = adjustment
                value = value * broadcast(scale, index) + broadcast(bias, index)
            y[index] = self._scale_and_center(value, feature)
            if self.masked == "zero" and weight(weights, index) == 0:
                y[index] = 0.0
        return y

    def gradients(
        self, x: Array, dy: Array, corrections: Corrections, adjustment: Pair | None, weights: Array | None = None
    ) -> Gradients:
        """The gradients of Σdy·y in training, by the formulas for weights.

        Where the output is zeroed dy is 0, and x - m is 0 wherever the weight is. So these are the derivatives, but
        where dy is not 0 at a normalized value of weight 0.
        """
        groups = self.moments(x, weights)
        first, second = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0.0)
        inner = np.zeros(x.shape)
        dx, dgamma, dbeta = np.zeros(x.shape), np.zeros(self.sizes), np.zeros(self.sizes)
        pair: Pair | None = None
        if adjustment is not None:
            pair = np.zeros(adjustment[0].shape), np.zeros(adjustment[1].shape)
        for index in np.ndindex(*x.shape):
            feature = self._feature(index)
            key = self._group(index, x), feature
            mean, variance, *_ = groups[key]
            r, d = corrections[feature]
            live = weight(weights, index) > 0
            up = 0.0 if self.masked == "zero" and not live else float(dy[index])
            centered = float(x[index]) - mean if live else 0.0
            normalized = centered / math.sqrt(variance + self.epsilon) * r + d
            gamma = float(self.variables["gamma"][feature]) if "gamma" in self.variables else 1.0
            factor, shift = (1.0, 0.0) if adjustment is None else (broadcast(value, index) for value in adjustment)
            dbeta[feature] += up
            dgamma[feature] += up * (normalized * factor + shift)
            if adjustment is not None and pair is not None:
                pair[0][place(adjustment[0], index)] += up * gamma * normalized
                pair[1][place(adjustment[1], index)] += up * gamma
            inner[index] = up * factor * gamma * r
            first[key] += float(inner[index])
            second[key] += float(inner[index]) * centered
        for index in np.ndindex(*x.shape):
            key = self._group(index, x), self._feature(index)
            mean, variance, count, _ = groups[key]
            square = variance + self.epsilon
            dx[index] = inner[index] / math.sqrt(square)
            w = weight(weights, index)
            if w > 0:
                through = (float(x[index]) - mean) * second[key] / square + first[key]
                dx[index] -= w * through / (count * math.sqrt(square))
        return Gradients(dx, dgamma, dbeta, pair)

    def _update(self, groups: Groups) -> None:
        averages = self.averages(groups)
        stored = self.averages(groups, self.bessel)
        for feature, (mean, variance) in averages.items():
            if not any(moments.total for (_, other), moments in groups.items() if other == feature):
                continue
            sigma = math.sqrt(variance + self.epsilon)
            self._move("moving_mean", feature, mean, self.momentum)
            if self.renorm:
                self._move("renorm_mean", feature, mean, self.renorm_momentum)
                self._move("renorm_stddev", feature, sigma, self.renorm_momentum)
                self._move("moving_stddev", feature, sigma, self.momentum)
                stddev = self.variables["moving_stddev"][feature]
                self.variables["moving_variance"][feature] = max(0.0, stddev * stddev - self.epsilon)
            else:
                self._move("moving_variance", feature, stored[feature][1], self.momentum)

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
        return int(index[0] % math.ceil(x.shape[0] / self.virtual_batch_size))


def weight(weights: Array | None, index: Index) -> float:
    """The weight of the value at an index of the input."""
    return 1.0 if weights is None else broadcast(weights, index)


def place(value: Array, index: Index) -> Index:
    """Where in `value` broadcasting looks for an index of the input."""
    own = index[len(index) - value.ndim :]
    return tuple(0 if size == 1 else i for i, size in zip(own, value.shape, strict=True))


def broadcast(value: Array, index: Index) -> float:
    """The element of `value` that broadcasting puts at an index of the input."""
    return float(value[place(value, index)])


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
