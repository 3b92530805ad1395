"""Write the files of this folder: `python make.py GENERATION`, where that generation of Keras is the one that is found.

``tf_keras`` writes files called tf_keras, axes, virtual and synchronized with tf_keras 2.21; of the last
only the .h5 is kept. ``keras-3.3`` and ``keras-3.13`` write KERAS.h5 and KERAS.keras with Keras 3.3.3 and 3.13.2.
Beside each is an .npz with an input, the model's output in inference, and its weights by layer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
RANDOM = np.random.default_rng(0)


def plain(keras: Any) -> list[Any]:
    """Layers as most models have them."""
    return [
        keras.layers.BatchNormalization(name="first", momentum=0.9, gamma_regularizer="l2", beta_constraint="non_neg"),
        keras.layers.BatchNormalization(name="second", axis=1, scale=False, dtype="mixed_float16", trainable=False),
    ]


def write(keras: Any, name: str, layers: list[Any]) -> None:
    """Save a model of these layers with random weights, as a functional one."""
    inputs = x = keras.layers.Input((4, 4, 3))
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, x)
    model.set_weights([RANDOM.uniform(0.5, 1.5, weight.shape) for weight in model.weights])
    x = RANDOM.normal(1.0, 2.0, (8, 4, 4, 3)).astype("float32")
    arrays = {f"{layer.name} {at}": w for layer in layers for at, w in enumerate(layer.get_weights())}
    np.savez(FOLDER / f"{name}.npz", x=x, y=np.asarray(model(x, training=False), "float32"), **arrays)
    model.save(FOLDER / f"{name}.keras")
    model.save(FOLDER / f"{name}.h5")


if __name__ == "__main__":
    if sys.argv[1] == "tf_keras":
        import tf_keras
        from tf_keras.src.layers.normalization.batch_normalization_v1 import BatchNormalization as Version1

        write(tf_keras, "tf_keras", plain(tf_keras))
        write(tf_keras, "axes", [tf_keras.layers.BatchNormalization(name="first", axis=[1, -1])])
        limits = {"rmax": 2.0, "dmax": 1.0}
        first = Version1(name="first", axis=1, virtual_batch_size=4, renorm=True, renorm_clipping=limits)
        write(tf_keras, "virtual", [first, Version1(name="second", virtual_batch_size=4)])
        second = tf_keras.layers.experimental.SyncBatchNormalization(name="second", axis=1)
        write(tf_keras, "synchronized", [tf_keras.layers.BatchNormalization(name="first"), second])
    else:
        import keras

        write(keras, sys.argv[1], plain(keras))
