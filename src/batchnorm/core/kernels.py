"""The passes over the data: their contract, a readable reference, and the rule that selects who serves.

Four passes do everything, whatever the options, because the layer is one affine map per group and feature. A faster
kernel is whoever computes the same four, alone or fused. `x` and `dy` are views as `geometry` gives them, already in
the type of the statistics; statistics keep the reduced axes with size 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .algebra import Affine, Array, Combination, Moments, Namespace, at_least_one

__all__ = ["COMPOSED", "gradient_combine", "gradient_sums", "moments", "origin", "scale_shift", "select"]

COMPOSED = "composed"
"""The name of the path made of the framework's own operations, which serves everything."""


def origin(xp: Namespace, x: Array, axes: Sequence[int]) -> Array:
    """The first value of each group and feature, 0 where there is none: what `moments` measures from."""
    # Some namespaces refuse a slice beyond the end, so an axis known to be empty is left whole.
    first = x[
        tuple(slice(None) if axis not in axes or x.shape[axis] == 0 else slice(0, 1) for axis in range(len(x.shape)))
    ]
    return xp.sum(first, axis=tuple(axes), keepdims=True)  # of one value, or of none


def moments(xp: Namespace, x: Array, axes: Sequence[int], count: Any, origin: Array) -> Moments:
    """Mean and biased variance over `axes`, `count` values each; 0 and 0 where there are none.

    Sums are of distances from `origin`, any value near the data and a constant to the gradient, and the variance is
    that of x − m: so both stay right in float32 where the mean is large beside the spread, however `sum` adds up.
    """
    count = at_least_one(xp, count)
    distance = x - origin
    mean = xp.sum(distance, axis=tuple(axes), keepdims=True) / count
    centered = distance - mean
    return Moments(origin + mean, xp.sum(centered * centered, axis=tuple(axes), keepdims=True) / count)


def scale_shift(x: Array, affine: Affine) -> Array:
    """y = scale·x + shift."""
    return x * affine.scale + affine.shift


def gradient_sums(xp: Namespace, dy: Array, x: Array, mean: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    """Σdy and Σdy·(x − m) over `axes`."""
    return (
        xp.sum(dy, axis=tuple(axes), keepdims=True),
        xp.sum(dy * (x - mean), axis=tuple(axes), keepdims=True),
    )


def gradient_combine(dy: Array, x: Array, combination: Combination) -> Array:
    """dx = dy_weight·dy + x_weight·x + constant."""
    return dy * combination.dy_weight + x * combination.x_weight + combination.constant


def select(fused: bool | None, kernels: Mapping[str, bool]) -> str:
    """Name the kernel that serves a call.

    `kernels` lists the fused ones, fastest first, each with whether it can serve the call. ``fused=False`` asks for
    the composed path; None and True take the fastest that can.

    >>> select(None, {"native": False, "FusedBatchNormV3": True})
    'FusedBatchNormV3'
    >>> select(False, {"native": True})
    'composed'
    """
    if fused is False:
        return COMPOSED
    return next((name for name, serves in kernels.items() if serves), COMPOSED)
