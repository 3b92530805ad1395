"""The array namespaces that the core is written over."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest


@dataclasses.dataclass(frozen=True)
class Arrays:
    """An array namespace, the way into it and back, and its own differentiation where it has one.

    `vjp` takes a function of arrays to an array, arrays, and a gradient of the result; it returns gradients of them.
    """

    name: str
    namespace: Any
    array: Callable[..., Any]
    vjp: Callable[[Callable[..., Any], list[Any], Any], list[Any]] | None = None

    def numpy(self, value: Any) -> npt.NDArray[Any]:
        """Bring an array back."""
        return np.asarray(value)


def _numpy() -> Arrays:
    from batchnorm.numpy import namespace

    return Arrays("numpy", namespace, np.asarray)


def _array_api_strict() -> Arrays:
    """The standard's own arrays, which refuse whatever is not in it; three verbs are not, or not for numbers."""
    import array_api_strict as strict

    kind = type(strict.asarray(0.0))

    def astype(x: Any, dtype: Any, /) -> Any:
        return strict.astype(x, dtype, copy=False) if isinstance(x, kind) else x

    def where(condition: Any, x1: Any, x2: Any, /) -> Any:
        dtype = x1.dtype if isinstance(x1, kind) else x2.dtype
        return strict.where(condition, *(strict.asarray(value, dtype=dtype) for value in (x1, x2)))

    names = ("broadcast_to", "concat", "isfinite", "maximum", "minimum", "ones_like", "reshape", "sqrt", "sum")
    verbs = {name: getattr(strict, name) for name in names}
    verbs |= {"astype": astype, "where": where, "shape": lambda x, /: x.shape, "stop_gradient": lambda x, /: x}
    return Arrays("array_api_strict", types.SimpleNamespace(**verbs), strict.asarray)


def _tensorflow() -> Arrays:
    import tensorflow as tf

    from batchnorm.tensorflow import namespace

    def vjp(function: Callable[..., Any], at: list[Any], dy: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(at)
            y = function(*at)
        found: list[Any] = tape.gradient(y, at, dy)
        return found

    # An array on the way, for a Python float would be a float32.
    return Arrays("tensorflow", namespace, lambda value: tf.constant(np.asarray(value)), vjp)


def _torch() -> Arrays:
    import torch

    from batchnorm.torch import namespace

    def vjp(function: Callable[..., Any], at: list[Any], dy: Any) -> list[Any]:
        leaves = [value.clone().requires_grad_() for value in at]
        return list(torch.autograd.grad(function(*leaves), leaves, dy))

    return Arrays("torch", namespace, lambda value: torch.as_tensor(np.asarray(value)), vjp)


@pytest.fixture(
    scope="session", params=[_numpy, _array_api_strict, _tensorflow, _torch], ids=lambda make: make.__name__[1:]
)
def xp(request: pytest.FixtureRequest) -> Arrays:
    arrays: Arrays = request.param()
    return arrays


@pytest.fixture(scope="session", params=[_tensorflow, _torch], ids=lambda make: make.__name__[1:])
def differentiating(request: pytest.FixtureRequest) -> Arrays:
    """The namespaces that differentiate by themselves."""
    arrays: Arrays = request.param()
    return arrays
