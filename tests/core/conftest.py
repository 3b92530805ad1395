"""The array namespaces that the core is written over."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def _numpy() -> Iterator[Arrays]:
    from batchnorm.numpy import namespace

    yield Arrays("numpy", namespace, np.asarray)


@contextlib.contextmanager
def _array_api_strict() -> Iterator[Arrays]:
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
    yield Arrays("array_api_strict", types.SimpleNamespace(**verbs), strict.asarray)


@contextlib.contextmanager
def _tensorflow() -> Iterator[Arrays]:
    import tensorflow as tf

    from batchnorm.tensorflow import namespace

    def vjp(function: Callable[..., Any], at: list[Any], dy: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(at)
            y = function(*at)
        found: list[Any] = tape.gradient(y, at, dy)
        return found

    # An array on the way, for a Python float would be a float32.
    yield Arrays("tensorflow", namespace, lambda value: tf.constant(np.asarray(value)), vjp)


@contextlib.contextmanager
def _torch() -> Iterator[Arrays]:
    import torch

    from batchnorm.torch import namespace

    def vjp(function: Callable[..., Any], at: list[Any], dy: Any) -> list[Any]:
        leaves = [value.clone().requires_grad_() for value in at]
        return list(torch.autograd.grad(function(*leaves), leaves, dy))

    yield Arrays("torch", namespace, lambda value: torch.as_tensor(np.asarray(value)), vjp)


@contextlib.contextmanager
def _jax() -> Iterator[Arrays]:
    import jax

    from batchnorm.jax import namespace

    def vjp(function: Callable[..., Any], at: list[Any], dy: Any) -> list[Any]:
        # Compiled as a whole, for one by one the many little operations take several times as long to compile.
        return list(jax.jit(lambda at, dy: jax.vjp(function, *at)[1](dy))(at, dy))

    before = jax.config.read("jax_disable_most_optimizations")
    with jax.enable_x64(True):
        jax.config.update("jax_disable_most_optimizations", True)  # what is tested is not XLA, which takes its time
        yield Arrays("jax", namespace, lambda value: jax.numpy.asarray(np.asarray(value)), vjp)
        jax.config.update("jax_disable_most_optimizations", before)


# Of a module and not of the session, for JAX's wide types are not to stay for tests of other modules.
@pytest.fixture(
    scope="module", params=[_numpy, _array_api_strict, _tensorflow, _torch, _jax], ids=lambda make: make.__name__[1:]
)
def xp(request: pytest.FixtureRequest) -> Iterator[Arrays]:
    with request.param() as arrays:
        yield arrays


@pytest.fixture(scope="module", params=[_tensorflow, _torch, _jax], ids=lambda make: make.__name__[1:])
def differentiating(request: pytest.FixtureRequest) -> Iterator[Arrays]:
    """The namespaces that differentiate by themselves."""
    with request.param() as arrays:
        yield arrays
