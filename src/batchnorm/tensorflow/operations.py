"""The CPU kernels as operations of TensorFlow, with their first and second derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from batchnorm import cpu
from batchnorm.core import algebra, geometry, normalize
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry, View
from batchnorm.core.normalize import Renorm
from batchnorm.core.options import Clipping
from batchnorm.cpu import KERNEL

from . import namespace as xp
from . import xla
from .namespace import accumulation_dtype

__all__ = ["KERNEL", "forward", "on_cpu", "serves"]


def _load() -> Any:
    path = cpu.binding("tensorflow")
    operations = None if path is None else tf.load_op_library(path)
    if path is None or not hasattr(operations, "batchnorm_forward"):
        return None
    cpu.share_threads(path)
    return operations


_operations = _load()


def serves(x: Any, plan: Geometry, epsilon: Any) -> bool:
    """Tell whether the kernels can compute the training step of a layer.

    They are for CPUs. Feature axes must collapse to what they see. XLA knows no operations but its own; it can call the
    kernels in another way, with an epsilon that is known.
    """
    return (
        x.dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64)
        and plan.collapses(x.shape.as_list())
        and on_cpu()
        and (xla.available() and not tf.is_tensor(epsilon) if xla.compiles() else _operations is not None)
    )


def on_cpu() -> bool:
    """Tell whether there is nothing but CPUs to compute on."""
    return all(device.device_type == "CPU" for device in tf.config.list_physical_devices())


def forward(
    x: Any,
    plan: Geometry,
    epsilon: Any,
    *,
    factor: Any = None,
    offset: Any = None,
    renorm: Renorm | None = None,
    weights: Any = None,
) -> tuple[Any, Moments]:
    """Normalize a batch in training.

    Args:
        x: The batch.
        plan: Its geometry.
        epsilon: Added to the variance.
        factor: One value for each feature, or None.
        offset: Likewise.
        renorm: What renorm corrects by, from before this step, or None.
        weights: Which positions count, in the order of x: booleans, or weights of the type of the arithmetic; or None.

    Returns:
        The output, and what averages move to, one value for each feature: over virtual batches the means of theirs. The
        count is that of the weights, without them any.
    """
    dtype = accumulation_dtype(x.dtype)

    def flat(value: Any) -> Any:
        return np.zeros(0, dtype.as_numpy_dtype) if value is None else tf.reshape(tf.cast(value, dtype), [-1])

    clipping = Clipping() if renorm is None else renorm.clipping
    nothing = flat(None)
    given = {
        "weights": np.zeros(0, bool) if weights is None else tf.reshape(weights, [-1]),
        "factor": flat(factor),
        "offset": flat(offset),
        "renorm_mean": nothing if renorm is None else flat(renorm.mean),
        "renorm_stddev": nothing if renorm is None else flat(renorm.stddev),
    }
    limits = [xp.astensor(limit, dtype) for limit in clipping.limits]
    if xla.compiles():
        given = {name: tf.convert_to_tensor(value) for name, value in given.items()}
        given["limits"] = tf.convert_to_tensor(nothing) if renorm is None else tf.stack(limits)
        y, group_mean, group_variance, count = _forward_in_xla(x, plan, float(epsilon), **given)
    else:
        y, group_mean, group_variance, count, _, _ = _operations.batchnorm_forward(
            x=x,
            view=xla.as_operand(_view(x, plan)),
            numbers=tf.stack([xp.astensor(epsilon, dtype), *limits]),
            axes=plan.axes,
            virtual_batch_size=plan.virtual_batch_size or 0,
            **given,
        )
    for value in (group_mean, group_variance):
        value.set_shape([None, None])
    mean, variance = (tf.cast(tf.stop_gradient(value), dtype) for value in (group_mean, group_variance))
    # Without weights groups are of one size.
    counts = 1 if weights is None else tf.cast(tf.stop_gradient(tf.reshape(count, [-1, 1])), dtype)
    return y, algebra.average_groups(xp, Moments(mean, variance, counts), None if plan.group_axis is None else 0)


def _view(x: Any, plan: Geometry) -> View:
    """How the kernels see a batch, of numbers of which some may be known only when the program runs."""
    sizes = x.shape.as_list()
    if None in sizes:
        dynamic = tf.shape(x, tf.int64)
        sizes = [dynamic[axis] if size is None else size for axis, size in enumerate(sizes)]
    view = plan.view(sizes)
    assert view is not None
    return view


def _present(value: Any, gradient: Any) -> Any:
    """The gradient of an input; None for an input that is absent, which has no elements."""
    return None if value.shape.num_elements() == 0 else gradient


# ---- Derivatives of the operations.


@tf.RegisterGradient("BatchnormForward")
def _forward_gradient(operation: Any, dy: Any, *_: Any) -> list[Any]:
    x, view, weights, factor, offset, renorm_mean, _, numbers = operation.inputs
    _, mean, variance, count, r, d = operation.outputs
    for value in (r, d):  # second derivatives must know in graphs, too, whether these are absent
        value.set_shape(renorm_mean.shape)
    dx, dfactor, doffset = _operations.batchnorm_backward(
        x=x,
        dy=dy,
        view=view,
        weights=weights,
        numbers=numbers,
        mean=mean,
        variance=variance,
        count=count,
        factor=factor,
        r=r,
        d=d,
        **_attributes(operation),
    )
    return [dx, None, None, _present(factor, dfactor), _present(offset, doffset), None, None, None]


@tf.RegisterGradient("BatchnormBackward")
def _backward_gradient(operation: Any, *upstream: Any) -> list[Any]:
    x, dy, _, weights, numbers, _, _, _, factor, r, d = operation.inputs
    dx, ddy, dfactor = _second_derivatives(x, dy, weights, factor, r, d, numbers[0], upstream, **_attributes(operation))
    return [dx, ddy, *[None] * 6, None if dfactor is None else _present(factor, dfactor), None, None]


def _second_derivatives(
    x: Any, dy: Any, weights: Any, factor: Any, r: Any, d: Any, epsilon: Any, upstream: Any, **static: Any
) -> list[Any]:
    """Second derivatives by x, dy and factor, by TensorFlow's own differentiation of the composed layer.

    The moments are taken as the functions of x that they are, so nothing is left for them as inputs.
    """
    offset = tf.zeros_like(upstream[2])
    with tf.GradientTape() as outer:
        outer.watch([x, dy, factor])
        with tf.GradientTape() as inner:
            inner.watch([x, factor, offset])
            y = _composed(x, weights, factor, offset, r, d, epsilon, **static)
        first = inner.gradient(y, [x, factor, offset], output_gradients=dy)
        pairs = [(value, weight) for value, weight in zip(first, upstream, strict=False) if value is not None]
    second: list[Any] = outer.gradient(
        [value for value, _ in pairs],
        [x, dy, factor],
        output_gradients=[tf.reshape(weight, tf.shape(value)) for value, weight in pairs],
    )
    return second


def _attributes(operation: Any) -> dict[str, Any]:
    return {name: operation.get_attr(name) for name in ("axes", "virtual_batch_size")}


def _composed(
    x: Any, weights: Any, factor: Any, offset: Any, r: Any, d: Any, epsilon: Any, axes: Any, virtual_batch_size: int
) -> Any:
    """What BatchnormForward computes, of TensorFlow's own operations."""
    plan = geometry.plan(tuple(x.shape.as_list()), tuple(axes), virtual_batch_size or None)
    weights, factor, offset, r, d = (_present(value, value) for value in (weights, factor, offset, r, d))
    if weights is not None:
        weights = tf.reshape(weights, [1 if axis in axes else size for axis, size in enumerate(xp.shape(x))])
    trained = normalize.train(
        xp,
        tf.cast(x, epsilon.dtype),
        plan,
        epsilon,
        gamma=factor,
        beta=offset,
        correction=None if r is None else (r, d),
        weights=weights,
    )
    return tf.cast(trained.y, x.dtype)


# ---- The kernels in XLA, which knows no gradients of operations.


def _forward_in_xla(
    x: Any,
    plan: Geometry,
    epsilon: float,
    *,
    weights: Any,
    factor: Any,
    offset: Any,
    renorm_mean: Any,
    renorm_stddev: Any,
    limits: Any,
) -> tuple[Any, Any, Any, Any]:
    """Give the output, and mean, variance and count of each virtual batch."""
    view = _view(x, plan)
    static = {"axes": plan.axes, "virtual_batch_size": plan.virtual_batch_size or 0}

    @tf.custom_gradient
    def forward(x: Any, factor: Any, offset: Any) -> Any:
        averages = renorm_mean, renorm_stddev, limits
        y, mean, variance, rest, count, r, d = xla.forward(x, view, weights, factor, offset, *averages, epsilon=epsilon)

        def gradient(dy: Any, *_: Any) -> list[Any]:
            saved = weights, mean, variance, rest, count, factor, r, d
            dx, dfactor, doffset = _backward_in_xla(x, dy, view, *saved, epsilon=epsilon, **static)
            return [dx, _present(factor, dfactor), _present(offset, doffset)]

        return (y, mean, variance, count), gradient

    found: tuple[Any, Any, Any, Any] = forward(x, factor, offset)
    return found


def _backward_in_xla(
    x: Any,
    dy: Any,
    view: View,
    weights: Any,
    mean: Any,
    variance: Any,
    rest: Any,
    count: Any,
    factor: Any,
    r: Any,
    d: Any,
    *,
    epsilon: float,
    **static: Any,
) -> Any:
    @tf.custom_gradient
    def backward(x: Any, dy: Any, factor: Any) -> Any:
        saved = weights, mean, variance, rest, count, factor, r, d

        def gradient(*upstream: Any) -> list[Any]:
            like = tf.constant(epsilon, factor.dtype)
            return _second_derivatives(x, dy, weights, factor, r, d, like, upstream, **static)

        return tuple(xla.backward(x, dy, view, *saved, epsilon=epsilon)), gradient

    return backward(x, dy, factor)
