"""Which numbers: from moments to one affine map per group and feature, its gradient, and the step of the averages.

Pure functions over an explicit array namespace `xp`. The letters are those of ``docs/mathematics.md``; every array
here is as small as the statistics, unless an adjustment varies within a feature.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any, NamedTuple, Protocol

from .options import Clipping

__all__ = [
    "Affine",
    "Array",
    "Correction",
    "GradientMap",
    "Moments",
    "Namespace",
    "affine",
    "average_groups",
    "bessel",
    "correction",
    "decrements",
    "divisor",
    "finite",
    "fold",
    "from_totals",
    "gradient_map",
    "inference_variance",
    "merge",
    "moving",
    "new_values",
    "parameter_gradients",
    "reshaped",
    "stddev",
    "step",
    "totals",
    "track",
    "unbiased_variance",
]

Array = Any


class Namespace(Protocol):
    """The verbs that this folder asks of an array namespace, nearly all of them from the array API standard."""

    def sqrt(self, x: Array, /) -> Array: ...
    def maximum(self, x1: Array, x2: Array, /) -> Array: ...
    def minimum(self, x1: Array, x2: Array, /) -> Array: ...
    def sum(self, x: Array, /, *, axis: Any, keepdims: bool) -> Array: ...
    def where(self, condition: Array, x1: Array, x2: Array, /) -> Array: ...
    def reshape(self, x: Array, shape: Any, /) -> Array: ...
    def broadcast_to(self, x: Array, shape: Any, /) -> Array: ...
    def concat(self, arrays: Any, /, *, axis: int) -> Array: ...
    def ones_like(self, x: Array, /) -> Array: ...
    def isfinite(self, x: Array, /) -> Array: ...

    def astype(self, x: Array, dtype: Any, /) -> Array:
        """Convert an array or a scalar; a Python number, or None, stays what it is."""

    def shape(self, x: Array, /) -> tuple[Any, ...]:
        """Sizes as ints, but for those that are not known before the program runs."""

    def stop_gradient(self, x: Array, /) -> Array:
        """The same values, which are constants to every derivative."""


class Moments(NamedTuple):
    """Mean m and biased variance v, and of how many values they are.

    Attributes:
        mean: m, rounded.
        variance: v.
        count: n, or Σw under weights: a number, or an array that broadcasts against the statistics.
        rest: What rounding took from the mean, where that is known. Beside a spread of 1 a mean of 10⁴ is rounded by
            half a thousandth in float32, so x − m is (x − mean) − rest.
        square_count: Σw² under weights; None where every value counts once, which makes it n.
    """

    mean: Array
    variance: Array
    count: Any
    rest: Any = 0.0
    square_count: Any = None

    @classmethod
    def near(cls, origin: Array, distance: Array, variance: Array, count: Any, square_count: Any = None) -> Moments:
        """Moments with their mean at a distance from an origin, which is near it."""
        mean = origin + distance
        return cls(mean, variance, count, distance - (mean - origin), square_count)


class Correction(NamedTuple):
    """Batch renormalization's r and d, constants to the gradient."""

    r: Array
    d: Array


class Affine(NamedTuple):
    """y = scale·(x − m) + offset; no offset is None."""

    scale: Array
    offset: Array | None


class GradientMap(NamedTuple):
    """dx = a·dy + w·(b·(x − m) + c), with w = 1 but for weights."""

    a: Array
    b: Array
    c: Array


def is_number(value: Any) -> bool:
    """Tell a number, or a size that a compiler leaves open, from an array."""
    return isinstance(value, (int, float)) or not hasattr(value, "dtype")


def divisor(xp: Namespace, count: Any) -> Any:
    """Make a count safe to divide by: 1 in the place of 0. Counts may be fractions, so their maximum with 1 is not."""
    return count or 1 if is_number(count) else xp.where(count > 0, count, 1)


def stddev(xp: Namespace, variance: Array, epsilon: Any) -> Array:
    """σ = sqrt(v + ε)."""
    return xp.sqrt(variance + epsilon)


def bessel(count: int) -> float:
    """Bessel's correction n/(n − 1); 1 up to a single value."""
    return count / (count - 1) if count > 1 else 1.0


def unbiased_variance(xp: Namespace, moments: Moments) -> Array:
    """Bessel's correction, v·n/(n − 1); v itself up to a single value. Under weights n is (Σw)²/Σw²."""
    n = moments.count
    if moments.square_count is not None:
        n = n * n / divisor(xp, moments.square_count)
    if is_number(n):
        return moments.variance * bessel(n)
    several = n > 1
    return moments.variance * xp.where(several, n / xp.where(several, n - 1, 1), 1)


def reshaped(xp: Namespace, moments: Moments, shape: Any) -> Moments:
    """Mean, variance and count of moments in another shape of as many values; a count of all stays a number."""
    count = moments.count
    if not is_number(count) and len(count.shape):  # one for several features is repeated
        count = xp.reshape(count * xp.ones_like(moments.mean), shape)
    return Moments(xp.reshape(moments.mean, shape), xp.reshape(moments.variance, shape), count)


def average_groups(xp: Namespace, moments: Moments, axis: int | None) -> Moments:
    """Average the moments of the virtual batches, by their counts; this is what averages and renorm see."""
    if axis is None:
        return moments
    share, count = _shares(xp, moments, axis)
    variance = xp.sum(moments.variance * share, axis=axis, keepdims=True)
    if is_number(moments.rest):
        return Moments(xp.sum(moments.mean * share, axis=axis, keepdims=True), variance, count)
    return Moments.near(*_average(xp, moments, axis, share), variance, count)


def merge(xp: Namespace, moments: Moments, axis: int) -> Moments:
    """Put the moments of parts of the same values together, along an axis that counts the parts.

    m = Σn·m/Σn and v = Σn·(v + (m − mean)²)/Σn (Chan, Golub & LeVeque, 1983). Parts of no values count for nothing.
    """
    share, count = _shares(xp, moments, axis)
    squares = moments.square_count
    if squares is not None:
        squares = xp.sum(squares * xp.ones_like(moments.mean), axis=axis, keepdims=True)
    merged = Moments.near(*_average(xp, moments, axis, share), 0, count, squares)
    apart = (moments.mean - merged.mean) + (moments.rest - merged.rest)
    return merged._replace(variance=xp.sum((moments.variance + apart * apart) * share, axis=axis, keepdims=True))


def totals(xp: Namespace, moments: Moments, dtype: Any) -> Array:
    """What replicas add up: Σw, Σw², and by feature n·m and n·(v + m²), along one axis; see `from_totals`.

    The second and third are about 0, and not about some mean, since no replica knows another's. So the type must be a
    wide one: in float64 the variance has a relative error of 10⁻¹⁶·(m/σ)², in float32 it would be lost.

    Args:
        xp: The array namespace.
        moments: One replica's, of as many values for each feature; of none, with m and v 0.
        dtype: The type to add up in.
    """
    mean = xp.reshape(xp.astype(moments.mean, dtype) + xp.astype(moments.rest, dtype), (-1,))
    variance = xp.reshape(xp.astype(moments.variance, dtype), (-1,))
    unit = xp.ones_like(mean[:1])
    squares = moments.count if moments.square_count is None else moments.square_count
    count, squares = (
        unit * value if is_number(value) else xp.reshape(xp.astype(value, dtype), (-1,))[:1]
        for value in (moments.count, squares)
    )
    return xp.concat([count, squares, count * mean, count * (variance + mean * mean)], axis=0)


def from_totals(xp: Namespace, totals: Array, shape: tuple[int, ...], dtype: Any) -> Moments:
    """The moments of all replicas' values together, in a shape and a type, from the sum of their `totals`."""
    features = math.prod(shape)
    count = totals[:1]
    first, second = totals[2 : 2 + features] / divisor(xp, count), totals[2 + features :] / divisor(xp, count)
    mean = xp.astype(first, dtype)
    return Moments(
        xp.reshape(mean, shape),
        xp.reshape(xp.astype(xp.maximum(second - first * first, 0), dtype), shape),
        xp.astype(count, dtype),
        xp.reshape(xp.astype(first - xp.astype(mean, totals.dtype), dtype), shape),
        xp.astype(totals[1:2], dtype),
    )


def _shares(xp: Namespace, moments: Moments, axis: int) -> tuple[Any, Any]:
    """The share that each part has in the count of all, and that count."""
    if is_number(moments.count):
        parts = xp.astype(xp.shape(moments.mean)[axis], moments.mean.dtype)
        return 1 / divisor(xp, parts), moments.count * parts
    count = moments.count * xp.ones_like(moments.mean)
    total = xp.sum(count, axis=axis, keepdims=True)
    return count / divisor(xp, total), total


def _average(xp: Namespace, moments: Moments, axis: int, share: Any) -> tuple[Array, Array]:
    """The mean of means as an origin, which is rounded like them, and a small distance from it."""
    origin = xp.sum(moments.mean * share, axis=axis, keepdims=True)
    return origin, xp.sum(((moments.mean - origin) + moments.rest) * share, axis=axis, keepdims=True)


def correction(
    xp: Namespace, moments: Moments, renorm_mean: Array, renorm_stddev: Array, epsilon: Any, clipping: Clipping
) -> Correction:
    """Batch renormalization's correction (Ioffe, 2017, algorithm 1).

    With s = max(renorm_stddev, sqrt(ε)), r = σ/s and d = (m − renorm_mean)/s, then clipped. All averages are those
    from before this step. No gradient flows through the result.
    """
    rmin, rmax, dmax = (xp.astype(limit, moments.mean.dtype) for limit in (clipping.rmin, clipping.rmax, clipping.dmax))
    floor = xp.maximum(renorm_stddev, epsilon**0.5)
    r = stddev(xp, moments.variance, epsilon) / floor
    d = ((moments.mean - renorm_mean) + moments.rest) / floor
    if rmin is not None:
        r = xp.maximum(r, rmin)
    if rmax is not None:
        r = xp.minimum(r, rmax)
    if dmax is not None:
        d = xp.minimum(xp.maximum(d, -dmax), dmax)
    return Correction(xp.stop_gradient(r), xp.stop_gradient(d))


def fold(
    gamma: Array | None, beta: Array | None, adjustment: tuple[Array, Array] | None
) -> tuple[Array | None, Array | None]:
    """What comes after the correction in two arrays, factor = a·γ and offset = b·γ + β; None is 1 and 0.

    Without an adjustment they are γ and β themselves. A kernel sees factor and offset; whoever folded them
    differentiates the fold.
    """
    if adjustment is None:
        return gamma, beta
    factor, offset = adjustment
    if gamma is not None:
        factor, offset = factor * gamma, offset * gamma
    return factor, offset if beta is None else offset + beta


def affine(
    xp: Namespace,
    moments: Moments,
    epsilon: Any,
    *,
    correction: Correction | None = None,
    factor: Array | None = None,
    offset: Array | None = None,
) -> Affine:
    """The whole layer as one map: y = ((x − m)/σ·r + d)·factor + offset."""
    scale = 1 / stddev(xp, moments.variance, epsilon)
    if correction is not None:
        scale = scale * correction.r
        shift = correction.d if factor is None else correction.d * factor
        offset = shift if offset is None else shift + offset
    return Affine(scale if factor is None else scale * factor, offset)


def gradient_map(
    xp: Namespace, moments: Moments, epsilon: Any, factor: Any, dy_sum: Array, dy_centered_sum: Array
) -> GradientMap:
    """The gradient for x as one map, from Σdy and Σdy·(x − m) over the values of each group and feature.

    y = (x − m)/σ·factor + … gives dx = (factor/σ)·(dy − Σdy/n − (x − m)·Σdy·(x − m)/(n·σ²)).
    """
    inverse, count = 1 / stddev(xp, moments.variance, epsilon), divisor(xp, moments.count)
    a = factor * inverse
    return GradientMap(a, -a * inverse * inverse * (dy_centered_sum / count), -a * (dy_sum / count))


def parameter_gradients(
    xp: Namespace, moments: Moments, epsilon: Any, correction: Correction | None, dy_sum: Array, dy_centered_sum: Array
) -> tuple[Array, Array]:
    """The gradients of factor and of offset by group, Σdy·(x̂·r + d) and Σdy, from the same two sums."""
    dfactor = dy_centered_sum / stddev(xp, moments.variance, epsilon)
    if correction is not None:
        dfactor = dfactor * correction.r + dy_sum * correction.d
    return dfactor, dy_sum


def inference_variance(xp: Namespace, moving_stddev: Array, epsilon: Any) -> Array:
    """The moving variance that belongs to a moving standard deviation: max(0, moving_stddev² − ε)."""
    return xp.maximum(moving_stddev * moving_stddev - epsilon, 0)


def decrements(
    xp: Namespace,
    averages: Mapping[str, Array],
    moments: Moments,
    epsilon: Any,
    *,
    rate: Any,
    renorm_rate: Any = None,
    moves: Any = None,
) -> dict[str, Array]:
    """What one step subtracts from each moving average: (average − new)·rate, in the type of the moments.

    Subtracting, and not assigning, keeps every contribution where several calls update one average. What does not move
    is selected and not multiplied by 0, so that it stays bit for bit whatever the batch was.

    Args:
        xp: The array namespace.
        averages: The averages that move, by name, as they were before the step: ``moving_mean`` with
            ``moving_variance``, or with ``moving_stddev``, and ``renorm_mean`` and ``renorm_stddev``. With renorm the
            moving variance follows from the moving standard deviation, by `inference_variance`.
        moments: The mean and the variance to move to, of as many values as averages. Of no values nothing moves.
        epsilon: Added to the variance.
        rate: Weight of the new value in the moving averages, 1 − decay.
        renorm_rate: That in renorm's averages.
        moves: What else must hold for a feature to move, or None.
    """
    moves = moving(moments, moves)
    return {} if moves is False else _decrements(xp, averages, moments, epsilon, rate, renorm_rate, moves)


def moving(moments: Moments, moves: Any = None) -> Any:
    """Which features move: an array of booleans, None for all of them, or False for none."""
    count = moments.count
    if is_number(count):
        return moves if count else False
    return count > 0 if moves is None else (count > 0) & moves


def finite(xp: Namespace, moments: Moments) -> Array:
    """Which features have finite moments, in all of their groups if these are averaged."""
    return xp.isfinite(moments.mean) & xp.isfinite(moments.variance)


def new_values(xp: Namespace, averages: Container[str], moments: Moments, epsilon: Any) -> dict[str, Array]:
    """What each moving average moves to, by name."""
    sigma = stddev(xp, moments.variance, epsilon) if "renorm_mean" in averages else None
    return {
        "moving_mean": moments.mean,
        "moving_variance": moments.variance,
        "moving_stddev": sigma,
        "renorm_mean": moments.mean,
        "renorm_stddev": sigma,
    }


def _decrements(
    xp: Namespace,
    averages: Mapping[str, Array],
    moments: Moments,
    epsilon: Any,
    rate: Any,
    renorm_rate: Any,
    moves: Any,
) -> dict[str, Array]:
    dtype, new = moments.variance.dtype, new_values(xp, averages, moments, epsilon)
    found = {}
    for name, average in averages.items():
        old = average if average.dtype == dtype else xp.astype(average, dtype)
        taken = (old - new[name]) * (renorm_rate if name in ("renorm_mean", "renorm_stddev") else rate)
        found[name] = taken if moves is None else xp.where(moves, taken, 0)
    return found


def step(
    xp: Namespace,
    averages: Mapping[str, Array],
    moments: Moments,
    epsilon: Any,
    *,
    rate: Any,
    renorm_rate: Any = None,
    moves: Any = None,
) -> dict[str, Array]:
    """The averages after one step; arguments as for `decrements`.

    With renorm the moving variance belongs to a moving standard deviation. Where that is not among the averages, as on
    PyTorch, it is the one that the moving variance had.
    """
    return _step(xp, averages, moments, epsilon, rate, renorm_rate, moving(moments, moves))


def _step(
    xp: Namespace,
    averages: Mapping[str, Array],
    moments: Moments,
    epsilon: Any,
    rate: Any,
    renorm_rate: Any,
    moves: Any,
) -> dict[str, Array]:
    if moves is False:
        return dict(averages)
    old, dtype = averages, moments.variance.dtype
    if "renorm_mean" in averages:
        old = {name: average for name, average in averages.items() if name != "moving_variance"}
        if "moving_stddev" not in old:
            old["moving_stddev"] = stddev(xp, xp.astype(averages["moving_variance"], dtype), epsilon)
    new = {}
    for name, taken in _decrements(xp, old, moments, epsilon, rate, renorm_rate, moves).items():
        average = old[name]
        new[name] = (
            average - taken if average.dtype == dtype else xp.astype(xp.astype(average, dtype) - taken, average.dtype)
        )
    if "renorm_mean" in old:
        variance = averages["moving_variance"]
        follows = xp.astype(inference_variance(xp, new["moving_stddev"], epsilon), variance.dtype)
        new["moving_variance"] = follows if moves is None else xp.where(moves, follows, variance)
    return {name: new[name] for name in averages}


def track(
    xp: Namespace,
    averages: Mapping[str, Array],
    moments: Moments,
    epsilon: Any,
    *,
    rate: Any,
    renorm_rate: Any,
    skip_nonfinite: bool,
) -> tuple[dict[str, Array], Any]:
    """The averages after a training step, and which features have moved, as `moving` tells it.

    Arguments are as for `decrements`; with `skip_nonfinite` features whose moments are not finite keep theirs.
    """
    moves = moving(moments, finite(xp, moments) if skip_nonfinite else None)
    return _step(xp, averages, moments, epsilon, rate, renorm_rate, moves), moves
