"""The layer composed of passes and algebra, for every framework: a training step, inference, and their gradients.

`x` is an array in the type of the arithmetic, of the shape that the plan is for. Parameters and statistics may have any
shape of as many values as there are features. Weights (a mask among them) have the rank of x, with size 1 on the
feature axes; they are constants to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from . import algebra, passes
from .algebra import Affine, Array, Correction, Moments, Namespace
from .geometry import Geometry
from .options import Clipping

__all__ = [
    "Gradients",
    "Masked",
    "Pair",
    "Renorm",
    "Trained",
    "adjustment_gradient",
    "average",
    "by_feature",
    "centered",
    "fold",
    "fold_gradient",
    "gather",
    "infer",
    "infer_gradient",
    "measure",
    "train",
    "train_gradient",
]

Masked = Literal["normalized", "zero"]
"""What stands at positions of weight 0 in the output."""
Pair = tuple[Array, Array]


class Renorm(NamedTuple):
    """What batch renormalization corrects by: its averages from before this step, and the limits."""

    mean: Array
    stddev: Array
    clipping: Clipping = Clipping()


class Trained(NamedTuple):
    """What a training step gives.

    Attributes:
        y: The output.
        averaged: What averages move to: moments of a parameter's shape beside the view, over virtual batches the means
            of theirs.
        moments: Those of each group.
        correction: Renorm's r and d, or None.
        centered: x − m as its virtual batches see it, 0 where the weight is; what a gradient wants.
    """

    y: Array
    averaged: Moments
    moments: Moments
    correction: Correction | None
    centered: Array


class Gradients(NamedTuple):
    """Gradients of one call; of parameters with the reduced axes of the view at size 1, None for absent ones."""

    x: Array
    gamma: Array | None
    beta: Array | None
    adjustment: Pair | None


class _Batch:
    """A batch as its virtual batches see it, with the weights of what is in them."""

    def __init__(self, xp: Namespace, x: Array, plan: Geometry, weights: Array | None, filler: Any = None) -> None:
        self._xp, self._plan, self._padding = xp, plan, 0
        if plan.group_axis is not None:
            self._shape = xp.shape(x)
            # Weights can say what fills up a last row, also where only the running program knows whether anything does.
            uneven = weights is not None
            self._split = plan.split(self._shape, uneven=uneven)
            self._padding = plan.padding(self._shape, uneven=uneven)
        self.x = self.view(x, filler)
        if weights is not None:
            weights = xp.astype(weights, x.dtype)
        elif self._is_padded:
            weights = xp.ones_like(x[tuple(slice(0, 1 if axis in plan.axes else None) for axis in range(plan.rank))])
        self.weights = None if weights is None else self.view(weights, filler=0)

    @property
    def _is_padded(self) -> bool:
        """Whether anything fills up a last row, or may."""
        return not isinstance(self._padding, int) or self._padding > 0

    @property
    def count(self) -> Any:
        """Values of each group and feature; weights have a count of their own."""
        if self.weights is not None:
            return None
        return self._xp.astype(self._plan.count(self._xp.shape(self.x)), self.x.dtype)

    def centered(self, moments: Moments) -> Array:
        """x − m, 0 where the weight is."""
        return _live(self._xp, self.x - moments.mean - moments.rest, self.weights)

    def view(self, values: Array, filler: Any = None) -> Array:
        """See an array of the input's rank by group; a last row is filled up with the first samples, or with zeros."""
        if self._plan.group_axis is None:
            return values
        xp, sizes = self._xp, self._xp.shape(values)
        if self._is_padded:
            more = values[: self._padding, ...]
            values = xp.concat([values, more if filler is None else xp.ones_like(more) * filler], axis=0)
        return xp.reshape(values, (*self._split[:2], *sizes[1:]))

    def join(self, values: Array) -> Array:
        """See an array by group as the input is."""
        if self._plan.group_axis is None:
            return values
        rows, groups, *_ = self._split
        joined = self._xp.reshape(values, (rows * groups if self._is_padded else self._shape[0], *self._shape[1:]))
        return joined[: self._shape[0], ...] if self._is_padded else joined

    def parameter(self, value: Array | None) -> Array | None:
        """A parameter or a statistic beside the view, in the type of the arithmetic."""
        return None if value is None else self._xp.reshape(self._xp.astype(value, self.x.dtype), self._plan.view_shape)


def train(
    xp: Namespace,
    x: Array,
    plan: Geometry,
    epsilon: Any,
    *,
    gamma: Array | None = None,
    beta: Array | None = None,
    adjustment: Pair | None = None,
    renorm: Renorm | None = None,
    correction: Pair | None = None,
    moments: Moments | None = None,
    weights: Array | None = None,
    masked: Masked = "normalized",
    unbiased: bool = False,
    merge: Callable[[Moments], Moments] | None = None,
) -> Trained:
    """Normalize by the batch: y = ((x − m)/σ·r + d)·factor + offset, factor = a·γ and offset = b·γ + β.

    Args:
        xp: The array namespace.
        x: The batch. Where virtual batches do not divide it, their sizes differ by one.
        plan: Its geometry.
        epsilon: Added to the variance.
        gamma: Scale γ, or None.
        beta: Offset β, or None.
        adjustment: a and b, which broadcast to x; not with virtual batches. Or None.
        renorm: The averages to correct by, or None.
        correction: In the place of `renorm` the r and d that it once gave, constants; or None.
        moments: In the place of the batch's own those to normalize by, of the view; or None.
        weights: How much each value counts, at least 0; or None.
        masked: Whether what weighs nothing is normalized like the rest or becomes 0.
        unbiased: Whether averages move to the unbiased variance, each group's by its own count.
        merge: Puts the moments of replicas together, or None.

    References:
        Ioffe & Szegedy, 2015. Ioffe, Batch Renormalization, 2017, algorithm 1. Hoffer et al., 2017 (virtual batches).
    """
    batch = _Batch(xp, x, plan, weights)
    given = moments is not None or merge is not None
    if moments is None:
        moments, centered = passes.moments(xp, batch.x, plan.reduced_axes, batch.count, batch.weights)
    if merge is not None:
        moments = merge(moments)
    if given:
        centered = batch.centered(moments)
    averaged = average(xp, moments, plan.group_axis, unbiased)
    corrected = None
    if renorm is not None:
        biased = average(xp, moments, plan.group_axis) if unbiased else averaged
        mean, stddev = batch.parameter(renorm.mean), batch.parameter(renorm.stddev)
        corrected = algebra.correction(xp, biased, mean, stddev, epsilon, renorm.clipping)
    elif correction is not None:
        corrected = Correction(*(batch.parameter(value) for value in correction))
    if adjustment is not None:
        adjustment = xp.astype(adjustment[0], x.dtype), xp.astype(adjustment[1], x.dtype)
    factor, offset = algebra.fold(batch.parameter(gamma), batch.parameter(beta), adjustment)
    affine = algebra.affine(xp, moments, epsilon, correction=corrected, factor=factor, offset=offset)
    y = _normalize(xp, batch.x, moments, centered, affine, batch.weights, masked)
    return Trained(batch.join(y), averaged, moments, corrected, centered)


def centered(xp: Namespace, x: Array, plan: Geometry, moments: Moments, weights: Array | None = None) -> Array:
    """x − m as `Trained` has it, of moments that were measured before."""
    return _Batch(xp, x, plan, weights).centered(moments)


def average(xp: Namespace, moments: Moments, axis: int | None, unbiased: bool = False) -> Moments:
    """What averages move to: over virtual batches the means by count, of variances that are unbiased first or not."""
    if unbiased:
        moments = moments._replace(variance=algebra.unbiased_variance(xp, moments))
    return algebra.average_groups(xp, moments, axis)


def gather(
    xp: Namespace, former: Moments | None, x: Array, plan: Geometry, dtype: Any, weights: Array | None = None
) -> Moments:
    """The moments of a batch and of what was gathered before, together; of the shape of the feature axes.

    Args:
        xp: The array namespace.
        former: What was gathered before, or None.
        x: The batch; its virtual batches are not seen.
        plan: Its geometry.
        dtype: The type to gather in, better a wide one.
        weights: How much each value counts, or None.
    """
    plan = plan.whole
    found, _ = passes.moments(xp, x, plan.reduced_axes, xp.astype(plan.count(xp.shape(x)), x.dtype), weights)
    parts = [_as_part(xp, plan, dtype, found)] + ([] if former is None else [_as_part(xp, plan, dtype, former)])
    together = Moments(*(xp.concat([part[i] for part in parts], axis=0) for i in range(len(found))))
    merged = algebra.merge(xp, together, 0)
    return Moments(*(xp.reshape(value, plan.feature_sizes) for value in merged))


def _as_part(xp: Namespace, plan: Geometry, dtype: Any, moments: Moments) -> list[Array]:
    """Moments whose fields are all arrays, with an axis in front that counts parts."""
    squares = moments.count if moments.square_count is None else moments.square_count
    mean = xp.reshape(xp.astype(moments.mean, dtype), (1, *plan.feature_sizes))
    filled = (
        xp.reshape(xp.astype(value * xp.ones_like(moments.mean), dtype), (1, *plan.feature_sizes))
        for value in (moments.variance, moments.count, moments.rest, squares)
    )
    return [mean, *filled]


def measure(xp: Namespace, x: Array, axes: Sequence[int], weights: Array | None = None) -> Moments:
    """Mean and biased variance over some axes, which stay with size 1; of what has a weight, where there are any."""
    sizes = xp.shape(x)
    count: Any = 1
    for axis in axes:
        count = count * sizes[axis]
    if weights is not None:
        weights = xp.astype(weights, x.dtype)
    return passes.moments(xp, x, axes, xp.astype(count, x.dtype), weights)[0]


def infer(
    xp: Namespace,
    x: Array,
    plan: Geometry,
    epsilon: Any,
    mean: Array,
    variance: Array,
    *,
    gamma: Array | None = None,
    beta: Array | None = None,
    weights: Array | None = None,
    masked: Masked = "normalized",
) -> Array:
    """Normalize by given statistics: y = (x − mean)/sqrt(variance + ε)·γ + β."""
    plan = plan.whole
    batch = _Batch(xp, x, plan, weights)
    mean, variance, gamma, beta = (batch.parameter(value) for value in (mean, variance, gamma, beta))
    moments = Moments(mean, variance, 1)
    affine = algebra.affine(xp, moments, epsilon, factor=gamma, offset=beta)
    centered = _live(xp, x - mean, batch.weights)
    return _normalize(xp, x, moments, centered, affine, batch.weights, masked)


def _live(xp: Namespace, values: Array, weights: Array | None) -> Array:
    """The same, but 0 where the weight is."""
    return values if weights is None else xp.where(weights > 0, values, 0)


def _normalize(
    xp: Namespace, x: Array, moments: Moments, centered: Array, affine: Affine, weights: Array | None, masked: Masked
) -> Array:
    """Apply the map to x − m, which is 0 to the scale's gradient where the weight is, so that NaN there stays there."""
    y = passes.normalize(centered, affine)
    if weights is None:
        return y
    if masked == "zero":
        return _live(xp, y, weights)
    return y + xp.stop_gradient(affine.scale) * xp.where(weights > 0, 0, x - moments.mean - moments.rest)


def by_feature(xp: Namespace, plan: Geometry, adjustment: Pair) -> Pair:
    """An adjustment by feature as a kernel wants it: one value for each, along one axis."""
    first, second = adjustment
    return _along_features(xp, plan, first), _along_features(xp, plan, second)


def _along_features(xp: Namespace, plan: Geometry, value: Array) -> Array:
    if tuple(value.shape) == plan.feature_sizes and len(plan.features) == 1:
        return value
    return xp.reshape(xp.broadcast_to(value, plan.input_shape), (-1,))


def fold(
    xp: Namespace, gamma: Array | None, beta: Array | None, adjustment: Pair | None
) -> tuple[Array | None, Array | None]:
    """What a kernel sees of γ, β and an adjustment that is `by_feature`: factor and offset."""
    if adjustment is None:
        return gamma, beta
    return algebra.fold(_flat(xp, gamma), _flat(xp, beta), adjustment)


def _flat(xp: Namespace, value: Array | None) -> Array | None:
    return value if value is None or len(value.shape) == 1 else xp.reshape(value, (-1,))


# ---- Gradients, for frameworks that do not differentiate.


def fold_gradient(
    dfactor: Array | None, doffset: Array | None, gamma: Array | None, adjustment: Pair | None
) -> tuple[Array | None, Array | None]:
    """The gradients of γ and β from those of factor = a·γ and offset = b·γ + β, along one axis with an adjustment."""
    if adjustment is None or gamma is None or dfactor is None or doffset is None:
        return dfactor, doffset
    return dfactor * adjustment[0] + doffset * adjustment[1], doffset


def adjustment_gradient(
    xp: Namespace, plan: Geometry, dfactor: Array, doffset: Array, gamma: Array | None, shapes: tuple[Any, Any]
) -> Pair:
    """The gradients of a and b, of the shapes that they had, from those of factor = a·γ and offset = b·γ + β."""
    if gamma is not None:
        gamma = _flat(xp, gamma)
        dfactor, doffset = dfactor * gamma, doffset * gamma
    scale, bias = (xp.reshape(value, plan.input_shape) for value in (dfactor, doffset))
    return _sum_to(xp, scale, shapes[0]), _sum_to(xp, bias, shapes[1])


def train_gradient(
    xp: Namespace,
    dy: Array,
    trained: Trained,
    plan: Geometry,
    epsilon: Any,
    *,
    gamma: Array | None = None,
    beta: Array | None = None,
    adjustment: Pair | None = None,
    weights: Array | None = None,
    masked: Masked = "normalized",
) -> Gradients:
    """The gradients of `train`, of whose arguments these are, for a gradient dy of its y.

    dx = a·dy + w·(b·(x − m) + c) in each group, from Σdy and Σdy·(x − m); an adjustment that varies within a feature
    goes into dy before the sums.
    """
    batch = _Batch(xp, dy, plan, weights, filler=0)
    moments, correction, centered = trained.moments, trained.correction, trained.centered
    dy = _live(xp, batch.x, batch.weights) if masked == "zero" else batch.x
    g = batch.parameter(gamma)
    inner = dy if adjustment is None else dy * adjustment[0]
    sums = passes.gradient_sums(xp, inner, centered, plan.reduced_axes)
    factor = 1 if g is None else g
    if correction is not None:
        factor = factor * correction.r
    gradient = algebra.gradient_map(xp, moments, epsilon, factor, *sums)
    dx = batch.join(passes.gradient_combine(xp, inner, centered, gradient, batch.weights))

    dgamma, dbeta = algebra.parameter_gradients(xp, moments, epsilon, correction, *sums)
    dadjustment = None
    if adjustment is not None:
        scale, bias = adjustment
        dgamma = dgamma + xp.sum(dy * bias, axis=plan.reduced_axes, keepdims=True)
        dbeta = xp.sum(dy, axis=plan.reduced_axes, keepdims=True)
        corrected = passes.normalize(centered, algebra.affine(xp, moments, epsilon, correction=correction))
        upstream = dy if g is None else dy * g
        dadjustment = _sum_to(xp, upstream * corrected, xp.shape(scale)), _sum_to(xp, upstream, xp.shape(bias))
    if plan.group_axis is not None:
        dgamma, dbeta = (xp.sum(value, axis=plan.group_axis, keepdims=True) for value in (dgamma, dbeta))
    return Gradients(dx, None if gamma is None else dgamma, None if beta is None else dbeta, dadjustment)


def infer_gradient(
    xp: Namespace,
    dy: Array,
    x: Array,
    plan: Geometry,
    epsilon: Any,
    mean: Array,
    variance: Array,
    *,
    gamma: Array | None = None,
    beta: Array | None = None,
    weights: Array | None = None,
    masked: Masked = "normalized",
) -> Gradients:
    """The gradients of `infer`, of whose arguments these are, for a gradient dy of y."""
    plan = plan.whole
    batch = _Batch(xp, x, plan, weights)
    mean, variance, g = (batch.parameter(value) for value in (mean, variance, gamma))
    centered = _live(xp, x - mean, batch.weights)
    dy = _live(xp, dy, batch.weights) if masked == "zero" else dy
    moments = Moments(mean, variance, 1)
    affine = algebra.affine(xp, moments, epsilon, factor=g)
    sums = passes.gradient_sums(xp, dy, centered, plan.reduced_axes)
    dgamma, dbeta = algebra.parameter_gradients(xp, moments, epsilon, None, *sums)
    return Gradients(dy * affine.scale, None if gamma is None else dgamma, None if beta is None else dbeta, None)


def _sum_to(xp: Namespace, value: Array, shape: tuple[int, ...]) -> Array:
    """Sum what broadcasting has repeated, so that a gradient has the shape of what it belongs to."""
    sizes = xp.shape(value)
    lead = len(sizes) - len(shape)
    repeated = tuple(axis for axis in range(len(sizes)) if axis < lead or (shape[axis - lead] == 1 != sizes[axis]))
    return xp.reshape(xp.sum(value, axis=repeated, keepdims=True) if repeated else value, shape)
