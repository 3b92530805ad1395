"""TensorFlow as the array namespace that `batchnorm.core` is written over."""

from typing import Any

import tensorflow as tf

__all__ = [
    "accumulation_dtype",
    "astensor",
    "astype",
    "broadcast_to",
    "concat",
    "isfinite",
    "maximum",
    "minimum",
    "ones_like",
    "reshape",
    "shape",
    "sqrt",
    "stop_gradient",
    "sum",
    "where",
]

broadcast_to = tf.broadcast_to
concat = tf.concat
isfinite = tf.math.is_finite
maximum = tf.maximum
minimum = tf.minimum
ones_like = tf.ones_like
reshape = tf.reshape
sqrt = tf.sqrt
stop_gradient = tf.stop_gradient


def sum(x: Any, /, *, axis: Any, keepdims: bool) -> Any:
    """Sum over axes."""
    return tf.reduce_sum(x, axis=axis, keepdims=keepdims)


def where(condition: Any, x1: Any, x2: Any, /) -> Any:
    """Choose; one of both may be a number."""
    dtype = x1.dtype if tf.is_tensor(x1) else x2.dtype
    return tf.where(condition, astensor(x1, dtype), astensor(x2, dtype))


def shape(x: Any, /) -> tuple[Any, ...]:
    """Sizes as ints where they are known, else scalar tensors."""
    static = tuple(x.shape.as_list())  # iterating would give Dimension objects in TensorFlow 1 behavior
    if None not in static:
        return static
    dynamic = tf.shape(x)
    return tuple(dynamic[axis] if size is None else size for axis, size in enumerate(static))


def astype(x: Any, dtype: Any, /) -> Any:
    """Convert a tensor or a variable; a Python number, or None, stays what it is."""
    return x if x is None or isinstance(x, (int, float)) else tf.cast(x, dtype)


def astensor(value: Any, dtype: Any) -> Any:
    """Make a tensor of a type; a Python number goes there directly, and not by way of float32."""
    return tf.cast(value, dtype) if tf.is_tensor(value) else tf.convert_to_tensor(value, dtype)


def accumulation_dtype(dtype: Any) -> Any:
    """The type of sums, and so of all arithmetic, on tensors of a type: float32 or wider."""
    return tf.float64 if dtype == tf.float64 else tf.float32
