"""Checkpoints of the older generation of batch renormalization."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from batchnorm.core import state
from batchnorm.core.options import small_number

__all__ = ["modernize_checkpoint", "read", "write"]

v1 = tf.compat.v1


def modernize_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str], epsilon: float = 1e-3) -> int:
    """Write a copy of a checkpoint in which every renorm layer has today's variables.

    The first versions of the original kept ``renorm_mean_weight`` and ``renorm_stddev_weight``, and no
    ``moving_stddev``; see `batchnorm.core.state.modernize`. Everything else is copied as it is.

    Args:
        source: Prefix of the checkpoint to read, as ``tf.compat.v1.train.Saver`` takes it.
        target: Prefix of the checkpoint to write.
        epsilon: The epsilon of the layers, which the checkpoint does not know.

    Returns:
        The number of layers converted.

    Raises:
        ValueError: If source and target are the same, or `epsilon` is negative.
        KeyError: If a renorm layer of the older generation is not whole.
        tf.errors.NotFoundError: If there is no checkpoint at `source`.
    """
    source, target = os.fspath(source), os.fspath(target)
    if os.path.abspath(source) == os.path.abspath(target):
        raise ValueError(f"target must differ from source; received {target!r} for both.")
    small_number("epsilon", epsilon)
    tensors = read(source)
    suffix = "renorm_mean_weight"
    prefixes = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    for prefix in prefixes:
        names = [prefix + name for name in state.OLDER_RENORM if prefix + name in tensors]
        old = {name.removeprefix(prefix): tensors.pop(name) for name in names}
        new = state.modernize(np, old, epsilon)
        tensors |= {prefix + name: value.astype(old["moving_variance"].dtype) for name, value in new.items()}
    write(target, tensors)
    return len(prefixes)


def read(prefix: str) -> dict[str, Any]:
    """Read the tensors of a checkpoint by name."""
    reader = tf.train.load_checkpoint(prefix)
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def write(prefix: str, tensors: Mapping[str, Any]) -> None:
    """Write a checkpoint by name, as ``tf.compat.v1.train.Saver`` reads it."""
    names = sorted(tensors)
    with tf.Graph().as_default(), v1.Session() as session:
        session.run(
            tf.raw_ops.SaveV2(
                prefix=prefix,
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=[tensors[n] for n in names],
            )
        )
