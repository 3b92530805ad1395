"""The CPU kernels as operations of TensorFlow, with their first and second derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # nothing public tells whether XLA compiles what is traced

from batchnorm import cpu
from batchnorm.core import algebra, geometry, normalize
from batchnorm.core.algebra import Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.normalize import Renorm
from batchnorm.core.options import Clipping
from batchnorm.cpu import KERNEL

from . import namespace as xp
from .namespace import wide

__all__ = ["KERNEL", "forward", "on_cpu", "serves"]


def _load() -> Any:
    path = cpu.binding("tensorflow")
    operations = None if path is None else tf.load_op_library(path)
    if path is None or not hasattr(operations, "batchnorm_forward"):
        return None
    cpu.share_threads(path)
    return operations


_operations = _load()


def serves(x: Any, plan: Geometry) -> bool:
    """Tell whether the operations can compute the training step of a layer.

    They are for CPUs, and XLA does not know them. Feature axes must collapse to what the kernels see.
    """
    return (
        _operations is not None
        and x.dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64)
        and plan.collapses(x.shape.as_list())
        and on_cpu()
        and not (not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(_graph()))
    )


def on_cpu() -> bool:
    """Tell whether there is nothing but CPUs to compute on."""
    return not tf.config.list_physical_devices("GPU")


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
    dtype = wide(x)

    def flat(value: Any) -> Any:
        return np.zeros(0, dtype.as_numpy_dtype) if value is None else tf.reshape(tf.cast(value, dtype), [-1])

    clipping = Clipping() if renorm is None else renorm.clipping
    nothing = flat(None)
    y, group_mean, group_variance, count, _, _ = _operations.batchnorm_forward(
        x=x,
        view=_view(x, plan),
        weights=np.zeros(0, bool) if weights is None else tf.reshape(weights, [-1]),
        factor=flat(factor),
        offset=flat(offset),
        renorm_mean=nothing if renorm is None else flat(renorm.mean),
        renorm_stddev=nothing if renorm is None else flat(renorm.stddev),
        numbers=tf.stack([xp.astensor(number, dtype) for number in (epsilon, *clipping.limits)]),
        axes=plan.axes,
        virtual_batch_size=plan.virtual_batch_size or 0,
    )
    for value in (group_mean, group_variance):
        value.set_shape([None, None])
    mean, variance = (tf.cast(tf.stop_gradient(value), dtype) for value in (group_mean, group_variance))
    # Without weights groups are of one size.
    counts = 1 if weights is None else tf.cast(tf.stop_gradient(tf.reshape(count, [-1, 1])), dtype)
    return y, algebra.average_groups(xp, Moments(mean, variance, counts), None if plan.group_axis is None else 0)


def _view(x: Any, plan: Geometry) -> Any:
    """How the kernels see a batch, of numbers of which some may be known only when the program runs."""
    sizes = x.shape.as_list()
    if None in sizes:
        dynamic = tf.shape(x, tf.int64)
        sizes = [dynamic[axis] if size is None else size for axis, size in enumerate(sizes)]
    view = plan.view(sizes)
    assert view is not None
    return tf.stack([tf.cast(number, tf.int64) for number in view]) if any(map(tf.is_tensor, view)) else list(view)


def _graph() -> Any:
    return tf.compat.v1.get_default_graph()


def _present(value: Any, gradient: Any) -> Any:
    """The gradient of an input; None for an input that is absent, which has no elements."""
    return None if value.shape.num_elements() == 0 else gradient


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
    """Second derivatives, by TensorFlow's own differentiation of the composed layer.

    The moments are taken as the functions of x that they are, so nothing is left for them as inputs.
    """
    x, dy, _, weights, numbers, _, _, _, factor, r, d = operation.inputs
    offset = tf.zeros_like(upstream[2])
    with tf.GradientTape() as outer:
        outer.watch([x, dy, factor])
        with tf.GradientTape() as inner:
            inner.watch([x, factor, offset])
            y = _composed(x, weights, factor, offset, r, d, numbers[0], **_attributes(operation))
        first = inner.gradient(y, [x, factor, offset], output_gradients=dy)
        pairs = [(value, weight) for value, weight in zip(first, upstream, strict=False) if value is not None]
    second = outer.gradient(
        [value for value, _ in pairs],
        [x, dy, factor],
        output_gradients=[tf.reshape(weight, tf.shape(value)) for value, weight in pairs],
    )
    dx, ddy, dfactor = second
    return [dx, ddy, *[None] * 6, None if dfactor is None else _present(factor, dfactor), None, None]


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
