"""Options as Keras saves them: limits of renorm, schedules and functions, to configurations and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras

from batchnorm.core.options import Clipping, received
from batchnorm.core.schedules import ClippingSchedule

__all__ = [
    "clipping",
    "clipping_config",
    "clipping_of",
    "function_config",
    "function_of",
    "generators",
    "limits",
    "tensors",
]

KEYS = ["rmax", "rmin", "dmax"]


def clipping(given: Mapping[str, Any] | None) -> Clipping:
    """Check the limits of renorm, in Keras' words where it has any.

    Raises:
        TypeError: For limits of the wrong type.
        ValueError: For limits that are none.
    """
    if isinstance(given, Mapping):
        if set(given) - set(KEYS):
            raise ValueError(
                f"Received invalid keys for `renorm_clipping` argument: {dict(given)}. Supported values: {KEYS}."
            )
        rmax, rmin, dmax = (value if isinstance(value, (int, float)) else None for value in map(given.get, KEYS))
        if rmax is not None and rmin is not None and rmax < rmin:
            raise ValueError(
                "rmax should be greater than rmin in the `renorm_clipping` argument. "
                f"Received: rmax={rmax}, rmin={rmin}."
            )
        if dmax is not None and dmax < 0:
            raise ValueError(f"dmax should be non-negative in the `renorm_clipping` argument. Received: dmax={dmax}.")
        if keras.backend.backend() == "jax" and any(isinstance(value, keras.Variable) for value in given.values()):
            raise ValueError(
                "renorm_clipping must not hold variables on JAX, where a compiled step would go on with the values "
                "that they had at first; received one. A function of the number of steps is taken."
            )
    return Clipping.of(given)


def limits(clipping: Clipping) -> dict[str, Any] | None:
    """The limits that there are, by name; None where there is none."""
    return {name: value for name, value in vars(clipping).items() if value is not None} or None


def tensors(clipping: Clipping) -> Clipping:
    """The same limits, with the values of variables in their place, which the limits do not train."""

    def read(limit: Any) -> Any:
        return keras.ops.stop_gradient(limit.value) if isinstance(limit, keras.Variable) else limit

    return Clipping(*map(read, (clipping.rmin, clipping.rmax, clipping.dmax)))


def clipping_config(given: Mapping[str, Any] | Callable[..., Any]) -> Any:
    """Limits as they are saved: numbers, even where they are tensors now; a schedule by its own arguments."""
    if isinstance(given, ClippingSchedule):
        return dataclasses.asdict(given)
    if callable(given):
        return function_config("renorm_clipping", given)
    return {name: float(keras.ops.convert_to_numpy(value)) for name, value in given.items()}


def clipping_of(config: Any) -> Any:
    """Limits as they were before."""
    if isinstance(config, Mapping) and "start" in config:
        return ClippingSchedule(**config)
    return (
        config if isinstance(config, Mapping) and not {"class_name", "config"} <= set(config) else function_of(config)
    )


class _Unregistered:
    """A function that a configuration holds for copies of a layer, and that cannot be saved."""

    def __init__(self, argument: str, function: Callable[..., Any]) -> None:
        self.argument, self.function = argument, function

    def get_config(self) -> dict[str, Any]:
        raise ValueError(
            f"{self.argument} must be registered by keras.saving.register_keras_serializable to be saved, a function "
            f"or a class with get_config; {received(self.function)}."
        )


def function_config(argument: str, function: Callable[..., Any]) -> Any:
    """A function as it is saved, or what raises when it is to be saved."""
    known = function if hasattr(function, "__name__") else type(function)
    if keras.saving.get_registered_object(keras.saving.get_registered_name(known)) is not known:
        return _Unregistered(argument, function)
    return keras.saving.serialize_keras_object(function)


def function_of(config: Any) -> Any:
    """A function as it was before."""
    if isinstance(config, _Unregistered):
        return config.function
    return config if callable(config) else keras.saving.deserialize_keras_object(config)


def generators(adjustment: Any) -> list[keras.random.SeedGenerator]:
    """The generators of random numbers that a function holds, whose state is the layer's then."""
    held = getattr(adjustment, "__dict__", {}).values()
    return [value for value in held if isinstance(value, keras.random.SeedGenerator)]
