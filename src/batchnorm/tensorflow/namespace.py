"""TensorFlow as the array namespace that `batchnorm.core` is written over."""

from typing import Any

import tensorflow as tf

__all__ = ["maximum", "minimum", "sqrt", "sum"]

maximum = tf.maximum
minimum = tf.minimum
sqrt = tf.sqrt


def sum(x: Any, /, *, axis: Any, keepdims: bool) -> Any:
    """Sum over axes."""
    return tf.reduce_sum(x, axis=axis, keepdims=keepdims)
