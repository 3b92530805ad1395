"""The layers of all dialects, seen alike: made with the reference's options, called with arrays, read by its names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import numpy as np
import numpy.typing as npt
import tensorflow as tf
import torch

import batchnorm.jax
import batchnorm.numpy
import batchnorm.tensorflow
import batchnorm.torch
from batchnorm.core.passes import COMPOSED
from batchnorm.cpu import KERNEL
from batchnorm.jax import primitives

__all__ = ["ALL", "Dialect", "Output"]

Array = npt.NDArray[Any]
Variables = Mapping[str, Array]


class Output(NamedTuple):
    """What a call gives, and who served it."""

    y: Array
    kernel: str


class Dialect:
    """A layer for inputs of one shape; `axis` is the reference's, `variables` have the shape of the feature axes."""

    def __init__(self, shape: tuple[int, ...], variables: Variables, **options: Any) -> None:
        raise NotImplementedError

    def __call__(self, x: Array, training: bool) -> Output:
        raise NotImplementedError

    def gradients(self, x: Array, dy: Array) -> list[Array]:
        """Those of a training step for x, gamma and beta."""
        raise NotImplementedError


class NumPy(Dialect):
    def __init__(self, shape: tuple[int, ...], variables: Variables, **options: Any) -> None:
        self.layer = batchnorm.numpy.BatchNormalization(**options)
        self.layer.build(shape, np.float32)
        placed = self.layer.moving_mean.shape
        self.layer.load({name: value.reshape(placed) for name, value in variables.items()})

    def __call__(self, x: Array, training: bool) -> Output:
        y = self.layer(x, training=training)
        return Output(y, str(self.layer.kernel))

    def gradients(self, x: Array, dy: Array) -> list[Array]:
        found = self.layer.vjp(x, training=True)[1](dy)
        return [found.inputs, np.asarray(found.gamma), np.asarray(found.beta)]


class TensorFlow(Dialect):
    def __init__(self, shape: tuple[int, ...], variables: Variables, **options: Any) -> None:
        adjustment = options.pop("adjustment", None)
        if adjustment is not None:
            options["adjustment"] = lambda _: tuple(tf.constant(each, tf.float32) for each in adjustment(shape))
        self.layer = batchnorm.tensorflow.BatchNormalization(**options)
        self.layer.build(shape)
        for name, value in variables.items():
            variable = getattr(self.layer, name)
            variable.assign(value.reshape(variable.shape))

    def __call__(self, x: Array, training: bool) -> Output:
        y = self.layer(tf.constant(x), training=training)
        return Output(y.numpy(), str(self.layer.kernel))

    def gradients(self, x: Array, dy: Array) -> list[Array]:
        given = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(given)
            y = self.layer(given, training=True)
        found = tape.gradient(y, [given, self.layer.gamma, self.layer.beta], tf.constant(dy))
        return [value.numpy() for value in found]


class PyTorch(Dialect):
    def __init__(self, shape: tuple[int, ...], variables: Variables, **options: Any) -> None:
        axis = options.pop("axis", -1)
        given = axis if isinstance(axis, (list, tuple)) else (axis,)
        axes = tuple(sorted(each % len(shape) for each in given))
        sizes = tuple(shape[each] for each in axes)
        adjustment = options.pop("adjustment", None)
        if adjustment is not None:
            options["adjustment"] = lambda _: tuple(
                torch.tensor(each, dtype=torch.float32) for each in adjustment(shape)
            )
        options["eps"] = options.pop("epsilon")
        named = {2: batchnorm.torch.BatchNorm1d, 3: batchnorm.torch.BatchNorm1d, 4: batchnorm.torch.BatchNorm2d}
        layer: Any
        if axes == (1,):
            layer = named[len(shape)](*sizes, **options)
        else:
            layer = batchnorm.torch.BatchNorm(sizes, axes, **options)
        self.layer = layer
        own = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        with torch.no_grad():
            for name, value in variables.items():
                if name != "moving_stddev":
                    getattr(layer, own.get(name, name)).copy_(torch.as_tensor(value))

    def __call__(self, x: Array, training: bool) -> Output:
        y = self.layer.train(training)(torch.as_tensor(x))
        return Output(y.detach().numpy(), str(self.layer.kernel))

    def gradients(self, x: Array, dy: Array) -> list[Array]:
        leaf = torch.as_tensor(x).requires_grad_()
        y = self.layer.train()(leaf)
        found = torch.autograd.grad(y, [leaf, self.layer.weight, self.layer.bias], torch.as_tensor(dy))
        return [value.numpy() for value in found]


class JAX(Dialect):
    NAMES = {"mean": "moving_mean", "var": "moving_variance"} | {
        name: name for name in ("renorm_mean", "renorm_stddev")
    }

    def __init__(self, shape: tuple[int, ...], variables: Variables, **options: Any) -> None:
        adjustment = options.pop("adjustment", None)
        options.pop("renorm", None)  # which the statistics tell
        self.options = options | {"adjustment": None if adjustment is None else adjustment(shape)}
        self.parameters = {"scale": variables["gamma"], "bias": variables["beta"]}
        self.statistics = {name: variables[long] for name, long in self.NAMES.items() if long in variables}

    def _apply(self, x: Any, parameters: Any, training: bool) -> Any:
        return batchnorm.jax.batch_norm(x, parameters, self.statistics, training=training, **self.options)[0]

    def __call__(self, x: Array, training: bool) -> Output:
        compiled = jax.jit(self._apply, static_argnums=2).lower(x, self.parameters, training)
        served = primitives.TARGETS["forward"] in compiled.as_text()
        return Output(np.asarray(compiled.compile()(x, self.parameters)), KERNEL if served else COMPOSED)

    def gradients(self, x: Array, dy: Array) -> list[Array]:
        _, vjp = jax.vjp(lambda x, parameters: self._apply(x, parameters, True), x, self.parameters)
        dx, parameters = jax.jit(vjp)(dy)
        return [np.asarray(value) for value in (dx, parameters["scale"], parameters["bias"])]


ALL: tuple[type[Dialect], ...] = (NumPy, TensorFlow, PyTorch, JAX)
