"""The passes over the data: their contract, a readable reference, and the rule that selects who serves.

Four passes do everything, whatever the options, because the layer is one affine map per group and feature. A faster
kernel is whoever computes the same four, alone or fused. `x` and `dy` are views as `geometry` gives them, already in
the type of the statistics; statistics keep the reduced axes with size 1. Weights have one value for each position, and
size 1 on the feature axes (or one for each value); what has weight 0 is never read into a sum, NaN included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .algebra import Affine, Array, GradientMap, Moments, Namespace, divisor

__all__ = ["COMPOSED", "gradient_combine", "gradient_sums", "moments", "normalize", "select"]

COMPOSED = "composed"
"""The name of the path made of the framework's own operations, which serves everything."""


def moments(
    xp: Namespace, x: Array, axes: Sequence[int], count: Any, weights: Array | None = None
) -> tuple[Moments, Array]:
    """Mean and biased variance over `axes`, of `count` values each (0 and 0 where there are none), and x − m.

    Sums are of distances from an origin, any value near the data and a constant to the gradient, and the variance is
    that of x − m: so all stay right in float32 where the mean is large beside the spread, however `sum` adds up. x − m
    is as exact only from there, since m itself is rounded; it is 0 where the weight is. The origin is the first value
    of each group and feature. Where that may weigh nothing, it is the mean by a plain sum, measured from there anew.
    """

    def total(values: Array) -> Array:
        return xp.sum(values, axis=tuple(axes), keepdims=True)

    if weights is None:
        number = divisor(xp, count)
        origin = xp.stop_gradient(_first(xp, x, axes))
        distance = x - origin
        mean = total(distance) / number
        centered = distance - mean
        return Moments.near(origin, mean, total(centered * centered) / number, count), centered
    count, live = total(weights), weights > 0
    number = divisor(xp, count)
    origin = xp.stop_gradient(total(xp.where(live, x, 0) * weights) / number)
    origin = origin + xp.stop_gradient(total(xp.where(live, x - origin, 0) * weights) / number)
    distance = xp.where(live, x - origin, 0)
    mean = total(weights * distance) / number
    centered = xp.where(live, distance - mean, 0)
    variance = total(weights * centered * centered) / number
    return Moments.near(origin, mean, variance, count, total(weights * weights)), centered


def _first(xp: Namespace, x: Array, axes: Sequence[int]) -> Array:
    """The first value of each group and feature, 0 where there is none."""
    # Some namespaces refuse a slice beyond the end, so an axis known to be empty is left whole.
    first = x[
        tuple(slice(None) if axis not in axes or x.shape[axis] == 0 else slice(0, 1) for axis in range(len(x.shape)))
    ]
    return xp.sum(first, axis=tuple(axes), keepdims=True)  # of one value, or of none


def normalize(centered: Array, affine: Affine) -> Array:
    """y = scale·(x − m) + offset, of x − m."""
    y = centered * affine.scale
    return y if affine.offset is None else y + affine.offset


def gradient_sums(xp: Namespace, dy: Array, centered: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    """Σdy and Σdy·(x − m) over `axes`."""
    return (
        xp.sum(dy, axis=tuple(axes), keepdims=True),
        xp.sum(dy * centered, axis=tuple(axes), keepdims=True),
    )


def gradient_combine(
    xp: Namespace, dy: Array, centered: Array, gradient: GradientMap, weights: Array | None = None
) -> Array:
    """dx = a·dy + w·(b·(x − m) + c)."""
    through_moments = centered * gradient.b + gradient.c
    if weights is not None:
        through_moments = xp.where(weights > 0, through_moments * weights, 0)
    return dy * gradient.a + through_moments


def select(fused: bool | None, kernels: Mapping[str, bool]) -> str:
    """Name the kernel that serves a call.

    `kernels` lists the fused ones, fastest first, each with whether it can serve the call. ``fused=False`` asks for
    the composed path; None and True take the fastest that can.

    >>> select(None, {"cpu": False, "FusedBatchNormV3": True})
    'FusedBatchNormV3'
    >>> select(False, {"cpu": True})
    'composed'
    """
    if fused is False:
        return COMPOSED
    return next((name for name, serves in kernels.items() if serves), COMPOSED)
