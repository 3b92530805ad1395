"""The native kernels as operations of TensorFlow, with their first and second derivatives."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util  # nothing public tells whether XLA compiles what is traced

import batchnorm
from batchnorm.core import algebra, kernels
from batchnorm.core.algebra import Correction, Moments
from batchnorm.core.geometry import Geometry
from batchnorm.core.options import Clipping
from batchnorm.native import KERNEL

from . import namespace as xp

__all__ = ["KERNEL", "forward", "on_cpu", "serves"]


def _load() -> Any:
    for folder in batchnorm.__path__:
        path = pathlib.Path(folder) / "_tensorflow_ops.so"
        if path.is_file():
            operations = tf.load_op_library(str(path))
            return operations if hasattr(operations, "batchnorm_forward") else None
    return None


_operations = _load()


def serves(plan: Geometry, shape: list[int | None], dtype: str | None, adjustment: tuple[Any, Any] | None) -> bool:
    """Tell whether the operations can compute the training step of a layer.

    They are for CPUs, and XLA does not know them. Feature axes must collapse to what the kernels see, and an adjustment
    must have one value for each feature.
    """
    return (
        _operations is not None
        and dtype in ("float16", "bfloat16", "float32", "float64")
        and plan.collapses(shape)
        and all(v.shape.rank is not None and plan.is_by_feature(v.shape.as_list()) for v in adjustment or ())
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
    gamma: Any = None,
    beta: Any = None,
    adjustment: tuple[Any, Any] | None = None,
    renorm: tuple[Any, Any] | None = None,
    clipping: Clipping | None = None,
) -> tuple[Any, Moments]:
    """Normalize a batch in training.

    Args:
        x: The batch.
        plan: Its geometry.
        epsilon: Added to the variance.
        gamma: Scale, or None.
        beta: Offset, or None.
        adjustment: Scale and bias with one value for each feature, or None.
        renorm: renorm's mean and standard deviation from before this step, or None.
        clipping: Limits of renorm's correction.

    Returns:
        The output, and the mean and variance that averages move to, of the shape of the parameters: over groups, the
        means of theirs.
    """
    wide = tf.float64 if x.dtype == tf.float64 else tf.float32

    def flat(value: Any) -> Any:
        if value is None:
            return tf.zeros([0], wide)
        return tf.reshape(tf.cast(value, wide), [-1])

    def by_feature(value: Any) -> Any:
        return flat(tf.broadcast_to(value, plan.input_shape))

    limits = clipping or Clipping()
    numbers = [
        epsilon,
        -math.inf if limits.rmin is None else limits.rmin,
        math.inf if limits.rmax is None else limits.rmax,
        math.inf if limits.dmax is None else limits.dmax,
    ]
    *apart, (first, last) = plan.runs(x.shape.as_list())
    scale, bias = (None, None) if adjustment is None else (by_feature(value) for value in adjustment)
    mean, stddev = renorm or (None, None)
    y, group_mean, group_variance, _, _ = _operations.batchnorm_forward(
        x=x,
        gamma=flat(gamma),
        beta=flat(beta),
        adjustment_scale=flat(scale),
        adjustment_bias=flat(bias),
        renorm_mean=flat(mean),
        renorm_stddev=flat(stddev),
        numbers=tf.stack([xp.astensor(number, wide) for number in numbers]),
        first=first,
        last=last,
        apart_first=apart[0][0] if apart else -1,
        apart_last=apart[0][1] if apart else -1,
        virtual_batch_size=plan.virtual_batch_size or 0,
    )
    moments = Moments(group_mean, group_variance)
    if plan.group_axis is not None:
        groups = tf.cast(tf.shape(group_mean)[0], wide)
        moments = algebra.average_groups(xp, moments, 0, groups)
    return y, Moments(*(tf.stop_gradient(tf.reshape(moment, plan.parameter_shape)) for moment in moments))


def _graph() -> Any:
    return tf.compat.v1.get_default_graph()


def _present(value: Any, gradient: Any) -> Any:
    """The gradient of an input; None for an input that is absent, which has no elements."""
    return None if value.shape.num_elements() == 0 else gradient


@tf.RegisterGradient("BatchnormForward")
def _forward_gradient(operation: Any, dy: Any, *_: Any) -> list[Any]:
    x, gamma, beta, scale, bias, _, _, numbers = operation.inputs
    _, mean, variance, r, d = operation.outputs
    dx, dgamma, dbeta, dscale, dbias = _operations.batchnorm_backward(
        x=x,
        dy=dy,
        numbers=numbers,
        mean=mean,
        variance=variance,
        gamma=gamma,
        r=r,
        d=d,
        adjustment_scale=scale,
        adjustment_bias=bias,
        **_attributes(operation),
    )
    gradients = [dx]
    for value, gradient in ((gamma, dgamma), (beta, dbeta), (scale, dscale), (bias, dbias)):
        gradients.append(_present(value, gradient))
    return [*gradients, None, None, None]


@tf.RegisterGradient("BatchnormBackward")
def _backward_gradient(operation: Any, *upstream: Any) -> list[Any]:
    """Second derivatives, by TensorFlow's own differentiation of the composed path.

    The moments are taken as the functions of x that they are, so nothing is left for them as inputs.
    """
    x, dy, numbers, _, _, gamma, r, d, scale, bias = operation.inputs
    beta = tf.zeros_like(upstream[2])
    sources = [x, dy, gamma, scale, bias]
    with tf.GradientTape() as outer:
        outer.watch(sources)
        with tf.GradientTape() as inner:
            inner.watch([x, gamma, beta, scale, bias])
            y = _composed(x, gamma, beta, scale, bias, r, d, numbers[0], _attributes(operation))
        first = inner.gradient(y, [x, gamma, beta, scale, bias], output_gradients=dy)
        pairs = [(one, weight) for one, weight in zip(first, upstream, strict=True) if one is not None]
    second = outer.gradient(
        [one for one, _ in pairs],
        sources,
        output_gradients=[tf.reshape(weight, tf.shape(one)) for one, weight in pairs],
    )
    by_source = [None if one is None else _present(source, one) for source, one in zip(sources, second, strict=True)]
    dx, ddy, dgamma, dscale, dbias = by_source
    return [dx, ddy, None, None, None, dgamma, None, None, dscale, dbias]


def _attributes(operation: Any) -> dict[str, int]:
    names = ("first", "last", "apart_first", "apart_last", "virtual_batch_size")
    return {name: operation.get_attr(name) for name in names}


def _composed(
    x: Any, gamma: Any, beta: Any, scale: Any, bias: Any, r: Any, d: Any, epsilon: Any, attributes: dict[str, int]
) -> Any:
    """What BatchnormForward computes, of TensorFlow's own operations."""
    first, last, size = (attributes[name] for name in ("first", "last", "virtual_batch_size"))
    shape = tf.shape(x)
    features, inner = tf.reduce_prod(shape[first : last + 1]), tf.reduce_prod(shape[last + 1 :])
    begin, end = attributes["apart_first"], attributes["apart_last"] + 1
    if size:
        lead = [size, shape[0] // size, tf.reduce_prod(shape[1:first])]
    elif end > 0:
        lead = [tf.reduce_prod(axes) for axes in (shape[:begin], shape[begin:end], shape[end:first])]
    else:
        lead = [tf.reduce_prod(shape[:first]), 1, 1]
    wide = epsilon.dtype
    view = tf.reshape(tf.cast(x, wide), tf.stack([*lead, features, inner]))
    axes = (0, 2, 4)
    count = tf.cast(lead[0] * lead[2] * inner, wide)
    origin = tf.stop_gradient(kernels.origin(xp, view, axes))

    def broadcast(value: Any) -> Any:
        return None if value.shape.num_elements() == 0 else tf.reshape(value, [1, -1 if end > 0 else 1, 1, features, 1])

    corrected, adjusted = broadcast(r), broadcast(scale)
    affine = algebra.affine(
        xp,
        kernels.moments(xp, view, axes, count, origin),
        epsilon,
        correction=None if corrected is None else Correction(corrected, broadcast(d)),
        adjustment=None if adjusted is None else (adjusted, broadcast(bias)),
        gamma=broadcast(gamma),
        beta=broadcast(beta),
    )
    return tf.cast(tf.reshape(kernels.scale_shift(view, affine), shape), x.dtype)
