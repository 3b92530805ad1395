"""Which numbers: from moments to one affine map per group and feature, its gradient, and the moving averages.

Pure functions over an explicit array namespace `xp`. The letters are those of ``docs/mathematics.md``; every array
here is as small as the statistics, unless an adjustment varies within a feature.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from .options import Clipping

__all__ = [
    "Affine",
    "Combination",
    "Correction",
    "Moments",
    "Namespace",
    "Target",
    "affine",
    "at_least_one",
    "average_groups",
    "bessel",
    "combination",
    "correction",
    "decrement",
    "inference_variance",
    "stddev",
    "targets",
]

Array = Any


class Namespace(Protocol):
    """The verbs that this folder asks of an array namespace, a subset of the array API standard."""

    def sqrt(self, x: Array, /) -> Array: ...
    def maximum(self, x1: Array, x2: Array, /) -> Array: ...
    def minimum(self, x1: Array, x2: Array, /) -> Array: ...
    def sum(self, x: Array, /, *, axis: Any, keepdims: bool) -> Array: ...


class Moments(NamedTuple):
    """Mean m and biased variance v."""

    mean: Array
    variance: Array


class Correction(NamedTuple):
    """Batch renormalization's r and d, constants to the gradient."""

    scale: Array
    shift: Array


class Affine(NamedTuple):
    """y = scale·x + shift."""

    scale: Array
    shift: Array


class Combination(NamedTuple):
    """dx = dy_weight·dy + x_weight·x + constant."""

    dy_weight: Array
    x_weight: Array
    constant: Array


class Target(NamedTuple):
    """What a moving average moves to, and the weight of its old value."""

    value: Array
    decay: Any


def at_least_one(xp: Namespace, count: Any) -> Any:
    """Make a count, a Python int or an array, safe to divide by."""
    return max(count, 1) if isinstance(count, int) else xp.maximum(count, 1)


def stddev(xp: Namespace, variance: Array, epsilon: Any) -> Array:
    """σ = sqrt(v + ε)."""
    return xp.sqrt(variance + epsilon)


def average_groups(xp: Namespace, moments: Moments, group_axis: int | None, groups: Any) -> Moments:
    """Average the moments of the virtual batches; this is what the moving averages and renorm see."""
    if group_axis is None:
        return moments
    groups = at_least_one(xp, groups)
    return Moments(*(xp.sum(moment, axis=group_axis, keepdims=True) / groups for moment in moments))


def bessel(xp: Namespace, variance: Array, count: Any) -> Array:
    """v·n/(n − 1), the unbiased variance of n values; v itself for a single one."""
    return variance * (count / at_least_one(xp, count - 1))


def correction(
    xp: Namespace, moments: Moments, renorm_mean: Array, renorm_stddev: Array, epsilon: Any, clipping: Clipping
) -> Correction:
    """Batch renormalization's correction (Ioffe, 2017, algorithm 1).

    With s = max(renorm_stddev, sqrt(ε)), r = σ/s and d = (m − renorm_mean)/s, then clipped. All averages are those
    from before this step. No gradient may flow through the result.
    """
    floor = xp.maximum(renorm_stddev, epsilon**0.5)
    r = stddev(xp, moments.variance, epsilon) / floor
    d = (moments.mean - renorm_mean) / floor
    if clipping.rmin is not None:
        r = xp.maximum(r, clipping.rmin)
    if clipping.rmax is not None:
        r = xp.minimum(r, clipping.rmax)
    if clipping.dmax is not None:
        d = xp.minimum(xp.maximum(d, -clipping.dmax), clipping.dmax)
    return Correction(r, d)


def affine(
    xp: Namespace,
    moments: Moments,
    epsilon: Any,
    *,
    correction: Correction | None = None,
    adjustment: tuple[Array, Array] | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
) -> Affine:
    """The whole layer as one map: y = (((x − m)/σ·r + d)·a + b)·γ + β = scale·x + shift."""
    scale = 1 / stddev(xp, moments.variance, epsilon)
    offset: Any = 0
    if correction is not None:
        scale, offset = scale * correction.scale, correction.shift
    if adjustment is not None:
        scale, offset = scale * adjustment[0], offset * adjustment[0] + adjustment[1]
    if gamma is not None:
        scale, offset = scale * gamma, offset * gamma
    if beta is not None:
        offset = offset + beta
    return Affine(scale, offset - moments.mean * scale)


def combination(
    xp: Namespace, moments: Moments, epsilon: Any, count: Any, factor: Any, dy_sum: Array, dy_centered_sum: Array
) -> Combination:
    """The gradient for x as one map, from Σdy and Σdy·(x − m) over the n values of each group and feature.

    y = (x − m)/σ·factor + … gives dx = (factor/σ)·(dy − Σdy/n − (x − m)·Σdy·(x − m)/(n·σ²)).
    """
    inverse = 1 / stddev(xp, moments.variance, epsilon)
    dy_weight = factor * inverse
    x_weight = -dy_weight * inverse * inverse * (dy_centered_sum / count)
    constant = -dy_weight * (dy_sum / count) - x_weight * moments.mean
    return Combination(dy_weight, x_weight, constant)


def decrement(old: Array, new: Array, decay: Any) -> Array:
    """What to subtract from a moving average: (a − new)·(1 − decay).

    Subtracting, and not assigning, keeps every contribution where several calls update one average.
    """
    return (old - new) * (1 - decay)


def inference_variance(xp: Namespace, moving_stddev: Array, epsilon: Any) -> Array:
    """The moving variance that belongs to a moving standard deviation: max(0, moving_stddev² − ε)."""
    return xp.maximum(moving_stddev * moving_stddev - epsilon, 0)


def targets(
    xp: Namespace, moments: Moments, variance: Array, epsilon: Any, decay: Any, renorm: bool, renorm_decay: Any
) -> dict[str, Target]:
    """What each moving average moves to in one training step, by name.

    `variance` is the one to store, biased or not. With renorm the moving variance is not among them: it follows from
    the moving standard deviation through `inference_variance`.
    """
    mean = {"moving_mean": Target(moments.mean, decay)}
    if not renorm:
        return mean | {"moving_variance": Target(variance, decay)}
    sigma = stddev(xp, moments.variance, epsilon)
    return mean | {
        "moving_stddev": Target(sigma, decay),
        "renorm_mean": Target(moments.mean, renorm_decay),
        "renorm_stddev": Target(sigma, renorm_decay),
    }
