"""TensorFlow: our layer, the original, and Keras 3's."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

import batchnorm.tensorflow
from benchmarks.cases import Case

from . import Array, Contender

__all__ = ["KEEPS_MEMORY", "PEERS", "TITLE", "array", "configure", "contenders", "extras", "ours", "versions"]

TITLE = "TensorFlow"
KEEPS_MEMORY = True
PEERS = ("the original", "Keras 3")


def configure(threads: int) -> None:
    """Set the threads that TensorFlow computes with."""
    warnings.filterwarnings("ignore", module="tf_keras|benchmarks")  # the original's own deprecations
    tf.config.threading.set_intra_op_parallelism_threads(threads)


def versions() -> str:
    """Name TensorFlow and Keras with their versions."""
    return f"TensorFlow {tf.__version__}, Keras {tf.keras.version()}"


def array(value: Any) -> Array:
    """Copy a tensor to NumPy."""
    return np.asarray(tf.cast(value, tf.float32))


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


def _run(layer: Any, case: Case, x: Any, dy: Any) -> Callable[[], list[Any]]:
    training = not case.mode.endswith("inference")

    def forward() -> list[Any]:
        return [layer(x, training=training)]

    def step() -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        return [y, *tape.gradient(y, [x, *layer.trainable_variables], output_gradients=dy)]

    run = step if case.mode.endswith("step") else forward
    return run if case.mode.startswith("eager") else tf.function(run)


@functools.lru_cache(maxsize=2)  # cases of one shape follow each other
def _data(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    x = tf.cast(tf.random.stateless_normal(shape, [1, 2], 0.5, 2.0), dtype)
    return x, tf.cast(tf.random.stateless_normal(shape, [3, 4]), dtype)


def ours(case: Case) -> Contender:
    """Make our layer on the data of a case."""
    layer = batchnorm.tensorflow.BatchNormalization(**_options(case))
    return Contender("batchnorm", _run(layer, case, *_data(case.shape, case.dtype)), lambda: layer.kernel)


def contenders(case: Case) -> tuple[list[Contender], Contender]:
    """Make the contenders of a case, ours first, and the floor: what reading and writing the data takes alone."""
    x, dy = _data(case.shape, case.dtype)
    found = [ours(case)]
    original = importlib.import_module("tf_keras.src.legacy_tf_layers.normalization")
    layer = original.BatchNormalization(dtype=case.dtype, **_options(case))
    found.append(Contender("the original", _run(layer, case, x, dy)))
    if case.option == "plain":
        keras_dtype = "mixed_bfloat16" if case.dtype == "bfloat16" else case.dtype
        keras = tf.keras.layers.BatchNormalization(axis=case.axis, dtype=keras_dtype, epsilon=1e-3)
        found.append(Contender("Keras 3", _run(keras, case, x, dy)))

    @tf.function
    def floor() -> list[Any]:  # a copy; and for the gradient, two read and one written
        return [-x, x + dy] if case.mode == "step" else [-x]

    return found, Contender("floor", floor)


def extras(quick: bool) -> list[tuple[Case, list[Contender]]]:
    """Make what is measured besides single layers: nothing."""
    return []
