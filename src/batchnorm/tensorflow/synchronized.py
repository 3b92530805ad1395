"""The statistics of all replicas of `tf.distribute` together: one collective forward, and one backward."""

from __future__ import annotations

import tensorflow as tf

from batchnorm.core import algebra
from batchnorm.core.algebra import Moments

from . import namespace as xp

__all__ = ["check", "has_replicas", "merge"]


def has_replicas() -> bool:
    """Tell whether this is called by one of several replicas: within ``strategy.run``.

    Outside of it, and while a model is built under ``strategy.scope()``, there is nobody to wait for.

    >>> has_replicas()
    False
    """
    context = tf.distribute.get_replica_context()
    return context is not None and context.num_replicas_in_sync > 1


def check() -> None:
    """Raise ValueError where TensorFlow has no derivative of what replicas add up."""
    if has_replicas() and not tf.compat.v1.executing_eagerly_outside_functions():
        raise ValueError(
            "synchronized must be False for replicas in a graph of TensorFlow 1, where TensorFlow has no derivative of "
            "what they add up; received True. In tf.function it has."
        )


def merge(moments: Moments) -> Moments:
    """Put the moments of all replicas together, whatever the count of each, zero included; elsewhere leave them.

    This is a `merge` of `normalize.train`. All replicas must call it, equally often. They get the same numbers, in the
    type and shape that theirs have. The gradient is that of the whole batch, by one collective of as many numbers:
    2 + 2·features of float64, for without a common origin float32 would lose the variance beside a large mean.

    Args:
        moments: Those of this replica's values, over whole batches, with as many values for each feature.
    """
    if not has_replicas():
        return moments
    totals = algebra.totals(xp, moments, tf.float64)
    totals = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, totals)
    return algebra.from_totals(xp, totals, tuple(moments.mean.shape.as_list()), moments.mean.dtype)
