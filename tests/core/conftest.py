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
    """An array namespace, and the way into it and back."""

    namespace: types.ModuleType
    array: Callable[..., Any]

    def numpy(self, value: Any) -> npt.NDArray[Any]:
        """Bring an array back."""
        return np.asarray(value)


def _numpy() -> Arrays:
    return Arrays(np, np.asarray)


def _array_api_strict() -> Arrays:
    import array_api_strict as strict

    return Arrays(strict, strict.asarray)


def _tensorflow() -> Arrays:
    import tensorflow as tf

    from batchnorm.tensorflow import namespace

    return Arrays(namespace, lambda value: tf.constant(np.asarray(value)))  # and not float32 for Python's floats


def _torch() -> Arrays:
    import torch

    from batchnorm.torch import namespace

    return Arrays(namespace, lambda value: torch.as_tensor(np.asarray(value)))


@pytest.fixture(
    scope="session", params=[_numpy, _array_api_strict, _tensorflow, _torch], ids=lambda make: make.__name__[1:]
)
def xp(request: pytest.FixtureRequest) -> Arrays:
    arrays: Arrays = request.param()
    return arrays
