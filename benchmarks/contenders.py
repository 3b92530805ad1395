"""The layers that are measured, each as a function of nothing that returns what a user would have."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import batchnorm.numpy
import batchnorm.tensorflow

from .cases import Case

__all__ = ["Contender", "contenders"]

Run = Callable[[], list[Any]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One layer on the data of a case.

    Attributes:
        name: Whose layer it is.
        run: Computes the case once. Outputs are allocated as the framework does.
        kernel: Says which of our kernels served.
    """

    name: str
    run: Run
    kernel: Callable[[], str | None] = lambda: None


def _options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {"axis": case.axis}
    if "renorm" in case.option:
        options |= {"renorm": True, "renorm_clipping": {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}}
    if "virtual" in case.option:
        options["virtual_batch_size"] = min(8, case.shape[0])
    if case.option == "adjustment":
        features = case.shape[case.axis]
        by_feature = [1] * len(case.shape)
        by_feature[case.axis] = features
        scale = tf.reshape(tf.linspace(0.93, 1.07, features), by_feature)
        options["adjustment"] = lambda shape: (scale, scale - 1)
    if case.option == "two axes":
        options["axis"] = [1, 2] if case.axis == -1 else [1, len(case.shape) - 1]
    return options


def _tensorflow(layer: Any, case: Case, x: Any, dy: Any) -> Run:
    training = case.mode != "inference"

    @tf.function
    def forward() -> list[Any]:
        return [layer(x, training=training)]

    @tf.function
    def step() -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        return [y, *tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)]

    return step if case.mode == "step" else forward  # type: ignore[no-any-return]


def contenders(case: Case) -> tuple[list[Contender], Contender]:
    """Make the contenders of a case, ours first, and the floor: what reading and writing the data takes alone."""
    x = tf.cast(tf.random.stateless_normal(case.shape, [1, 2], 0.5, 2.0), case.dtype)
    dy = tf.cast(tf.random.stateless_normal(case.shape, [3, 4]), case.dtype)
    ours = batchnorm.tensorflow.BatchNormalization(**_options(case))
    found = [Contender("batchnorm", _tensorflow(ours, case, x, dy), lambda: ours.kernel)]
    original = importlib.import_module("tf_keras.src.legacy_tf_layers.normalization")
    layer = original.BatchNormalization(dtype=case.dtype, **_options(case))
    found.append(Contender("the original", _tensorflow(layer, case, x, dy)))
    if case.option == "plain":
        keras_dtype = "mixed_bfloat16" if case.dtype == "bfloat16" else case.dtype
        keras = tf.keras.layers.BatchNormalization(axis=case.axis, dtype=keras_dtype, epsilon=1e-3)
        found.append(Contender("Keras 3", _tensorflow(keras, case, x, dy)))

    @tf.function
    def floor() -> list[Any]:  # a copy; and for the gradient, two read and one written
        return [-x, x + dy] if case.mode == "step" else [-x]

    return found, Contender("floor", floor)


def tiny_numpy() -> Contender:
    """Our NumPy layer on the smallest shape, where a call itself is what takes time."""
    layer = batchnorm.numpy.BatchNormalization()
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    return Contender("batchnorm.numpy", lambda: [layer(x, training=True)], lambda: layer.kernel)
