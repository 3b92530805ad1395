"""Install the layer where TensorFlow 1 code looks for it."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from batchnorm.core.options import flag

from .layer import BatchNorm, BatchNormalization, batch_norm, batch_normalization

__all__ = ["install"]

_NAMES = {"BatchNormalization": BatchNormalization, "batch_normalization": batch_normalization}
_ALIASES = {"BatchNorm": BatchNorm, "batch_norm": batch_norm}
_LEGACY = "tf_keras.api._v1.keras.__internal__.legacy.layers"
"""The module that ``tf.compat.v1.layers`` becomes under legacy Keras, at the first name asked of it."""


def install(*, fused: bool | None = None) -> contextlib.ExitStack:
    """Put `BatchNormalization` and `batch_normalization` into ``tf.compat.v1.layers``.

    They stay there, unless the result is used as a context manager, at whose end everything is as it was before. The
    same goes for ``tensorflow.python.layers.normalization``, with its names ``BatchNorm`` and ``batch_norm``.

    Under legacy Keras (``TF_USE_LEGACY_KERAS=1`` in the environment before TensorFlow is imported, and the package
    ``tf_keras``) all other layers of TensorFlow 1 are there, too, and stay the original's.

    Args:
        fused: What ``fused`` is for layers that are made from now on and are not given one. True: our kernels serve
            training also in graphs whose ``training`` is a tensor, which then load where this package is only.

    Raises:
        TypeError: If `fused` is not True, False or None.

    >>> with install():
    ...     tf.compat.v1.layers.BatchNormalization is BatchNormalization
    True
    >>> "BatchNormalization" in vars(tf.compat.v1.layers)
    False
    """
    if fused is not None:
        fused = flag("fused", fused)
    undo = contextlib.ExitStack()
    for module, values in _places():
        for name, value in values.items():
            if name in vars(module):
                undo.callback(_set, module, name, vars(module)[name])
            else:
                undo.callback(_remove, module, name)
            _set(module, name, value)
    undo.callback(setattr, BatchNormalization, "_default_fused", BatchNormalization._default_fused)
    BatchNormalization._default_fused = fused
    return undo


def _places() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every module in which TensorFlow 1 code finds the layer, each with the names that it has there."""
    # `tf.compat.v1` and `import tensorflow.compat.v1` are two modules. Each has `layers` as an attribute, which loads
    # Keras when it is asked for a name, and as a module to be imported, which then takes the attribute's place.
    homes: list[Any] = [tf.compat.v1, importlib.import_module("tensorflow.compat.v1")]
    for home in homes:
        attribute = home.layers
        yield attribute, _NAMES
        imported = importlib.import_module(f"{home.__name__}.layers")
        home.layers = attribute
        if imported is not attribute:
            yield imported, _NAMES
    if os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True"):  # as TensorFlow reads it
        with contextlib.suppress(ModuleNotFoundError):
            yield importlib.import_module(_LEGACY), _NAMES
    yield importlib.import_module("tensorflow.python.layers.normalization"), _NAMES | _ALIASES


def _is_lazy(module: Any) -> bool:
    """Whether setting a name would load Keras."""
    return hasattr(type(module), "_load")


def _set(module: Any, name: str, value: Any) -> None:
    if _is_lazy(module):
        vars(module)[name] = value
    else:
        setattr(module, name, value)


def _remove(module: Any, name: str) -> None:
    if _is_lazy(module):
        vars(module).pop(name, None)
    elif name in vars(module):
        delattr(module, name)
