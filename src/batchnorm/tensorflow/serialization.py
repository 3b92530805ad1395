"""Initializers, regularizers and constraints: from what users write to functions, and to configurations and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from batchnorm.core.options import received

__all__ = ["get", "serialize"]


def get(argument: str, value: Any) -> Callable[..., Any] | None:
    """Find the function that an argument names.

    Functions (initializer objects among them) are taken as they are, classes are called without arguments. Names and
    configurations of initializers mean those of ``tf.compat.v1.initializers``; everything else by name or
    configuration means Keras' own, which is only then imported.

    Args:
        argument: Name of the argument, which ends in its kind: initializer, regularizer or constraint.
        value: None, a function, a class, a name or a configuration.

    Raises:
        ValueError: If there is nothing of that name.
        TypeError: If the value is none of these.

    >>> get("beta_initializer", "zeros")([2], tf.float32).numpy()
    array([0., 0.], dtype=float32)
    """
    kind = argument.rpartition("_")[2]
    if value is None:
        return None
    if isinstance(value, type):
        value = value()
    if callable(value):
        return value  # type: ignore[no-any-return]
    if not isinstance(value, (str, Mapping)):
        raise TypeError(f"{argument} must be None, a function, a name or a configuration; {received(value)}.")
    if kind == "initializer" and (stock := _stock_initializer(value)) is not None:
        return stock
    try:
        return getattr(tf.keras, f"{kind}s").get(value)  # type: ignore[no-any-return]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{argument} names no {kind} that is known; {received(value)}.") from error


def serialize(value: Any) -> Any:
    """Turn a function into its configuration; one that has none stands for itself."""
    if hasattr(value, "get_config"):
        return {"class_name": type(value).__name__, "config": value.get_config()}
    return value


def _stock_initializer(value: str | Mapping[str, Any]) -> Callable[..., Any] | None:
    stock = tf.compat.v1.initializers
    if isinstance(value, str):
        value = {"class_name": value, "config": {}}
    name, config = value.get("class_name", ""), value.get("config", {})
    found = next(
        (
            initializer
            for key, initializer in vars(stock).items()
            if isinstance(initializer, type)
            and name in (key, initializer.__name__)
            and hasattr(initializer, "from_config")
        ),
        None,
    )
    return None if found is None else found.from_config(dict(config))
