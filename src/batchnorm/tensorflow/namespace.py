"""TensorFlow as the array namespace that `batchnorm.core` is written over."""

from typing import Any

import tensorflow as tf

__all__ = ["astensor", "maximum", "minimum", "sqrt", "sum"]

maximum = tf.maximum
minimum = tf.minimum
sqrt = tf.sqrt


def sum(x: Any, /, *, axis: Any, keepdims: bool) -> Any:
    """Sum over axes."""
    return tf.reduce_sum(x, axis=axis, keepdims=keepdims)


def astensor(value: Any, dtype: Any) -> Any:
    """Make a tensor of a type; a Python number goes there directly, and not by way of float32."""
    return tf.cast(value, dtype) if tf.is_tensor(value) else tf.convert_to_tensor(value, dtype)
