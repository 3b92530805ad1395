"""The passes over the data: their contract, a readable reference, and the rule that selects who serves.

Four passes do everything, whatever the options, because the layer is one affine map per group and feature. A faster
kernel is whoever computes the same four, alone or fused. `x` and `dy` are views as `geometry` gives them, already in
the type of the statistics; statistics keep the reduced axes with size 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .algebra import Affine, Array, Combination, Moments, Namespace, at_least_one

__all__ = ["COMPOSED", "gradient_combine", "gradient_sums", "moments", "scale_shift", "select"]

COMPOSED = "composed"
"""The name of the path made of the framework's own operations, which serves everything."""


def moments(xp: Namespace, x: Array, axes: Sequence[int], count: Any) -> Moments:
    """Mean and biased variance over `axes`, `count` values each; 0 and 0 where there are none.

    Two passes: the variance is that of x − m, so it stays right where the mean is large beside the spread.
    """
    count = at_least_one(xp, count)
    mean = xp.sum(x, axis=tuple(axes), keepdims=True) / count
    centered = x - mean
    return Moments(mean, xp.sum(centered * centered, axis=tuple(axes), keepdims=True) / count)


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
