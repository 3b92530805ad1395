"""Install the layer where TensorFlow 1 code looks for it."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import tensorflow as tf

from .layer import BatchNormalization, batch_normalization

__all__ = ["install"]

_INSTALLED = {"BatchNormalization": BatchNormalization, "batch_normalization": batch_normalization}


def install() -> contextlib.ExitStack:
    """Put `BatchNormalization` and `batch_normalization` into ``tf.compat.v1.layers``.

    They stay there, unless the result is used as a context manager, at whose end everything is as it was before.

    >>> with install():
    ...     tf.compat.v1.layers.BatchNormalization is BatchNormalization
    True
    >>> "BatchNormalization" in vars(tf.compat.v1.layers)
    False
    """
    undo = contextlib.ExitStack()
    for module in _layers_modules():
        names = vars(module)  # asking a lazy module for a name that it lacks would load Keras
        for name, value in _INSTALLED.items():
            if name in names:
                undo.callback(names.__setitem__, name, names[name])
            else:
                undo.callback(names.pop, name, None)
            names[name] = value
    return undo


def _layers_modules() -> list[Any]:
    """Every module that goes by the name of ``tf.compat.v1.layers``.

    ``tf.compat.v1`` and ``import tensorflow.compat.v1`` are two modules, and each has its own.
    """
    homes = [tf.compat.v1, importlib.import_module("tensorflow.compat.v1")]
    return list({id(home.layers): home.layers for home in homes}.values())
