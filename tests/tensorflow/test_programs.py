"""Whole TensorFlow 1 programs under `python -m batchnorm run`, and models of Keras: the numbers of the original."""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

import batchnorm.tensorflow
from batchnorm.tensorflow import BatchNormalization

# What is random has a seed of its own, for other seeds depend on how many operations a graph has. With its usual
# epsilon of 1e-8 Adam turns the rounding of a gradient near 0 into a whole step.
FLAT = """
    import numpy as np
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    tf.app.flags.DEFINE_string("folder", None, "where checkpoints go")
    FLAGS = tf.app.flags.FLAGS

    def network(images, training):
        start = lambda seed: tf.initializers.glorot_uniform(seed=seed)
        h = tf.layers.conv2d(images, 6, 3, padding="same", use_bias=False, kernel_initializer=start(1))
        h = tf.layers.batch_normalization(h, training=training, momentum=0.8)
        h = tf.layers.max_pooling2d(tf.nn.relu(h), 2, 2)
        h = tf.layers.conv2d(h, 8, 3, padding="same", use_bias=False, kernel_initializer=start(2))
        h = tf.nn.relu(tf.layers.batch_normalization(h, training=training, momentum=0.8, fused=False, name="last"))
        h = tf.layers.dropout(tf.layers.flatten(h), 0.1, seed=3, training=training)
        return tf.layers.dense(h, 4, kernel_initializer=start(4))

    def main(_):
        images = tf.placeholder(tf.float32, [None, 8, 8, 1])
        labels = tf.placeholder(tf.int64, [None])
        training = tf.placeholder_with_default(False, [])
        logits = network(images, training)
        loss = tf.losses.sparse_softmax_cross_entropy(labels, logits)
        update_ops = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        with tf.control_dependencies(update_ops):
            train_op = tf.train.AdamOptimizer(0.01, epsilon=0.01).minimize(loss)
        saver = tf.train.Saver()
        random = np.random.RandomState(0)
        kinds = random.normal(size=(4, 8, 8, 1))
        with tf.Session() as sess:
            sess.run(tf.global_variables_initializer())
            for _ in range(12):
                y = random.randint(4, size=16)
                feed = {images: kinds[y] + random.normal(size=(16, 8, 8, 1)), labels: y, training: True}
                print("LOSS", sess.run([loss, train_op], feed)[0])
            path = saver.save(sess, FLAGS.folder + "/model")
        with tf.Session() as sess:
            saver.restore(sess, path)
            print("LOGITS", *sess.run(logits, {images: kinds}).ravel())
        print("NAMES", *(v.op.name for v in tf.global_variables() if "batch" in v.op.name or "last" in v.op.name))
        print("LAYER", tf.layers.BatchNormalization.__module__)

    if __name__ == "__main__":
        tf.app.run()
"""
CLASSES = """
    import argparse

    import numpy as np
    import tensorflow as tf

    tf1 = tf.compat.v1
    tf1.disable_eager_execution()

    class Block(tf1.layers.Layer):
        def __init__(self, units, seed, **kwargs):
            super().__init__(**kwargs)
            start = tf1.initializers.he_normal(seed=seed)
            self.dense = tf1.layers.Dense(units, use_bias=False, kernel_initializer=start, name="dense")
            self.normalize = tf1.layers.BatchNormalization(renorm=True, momentum=0.8, renorm_momentum=0.8, name="bn")

        def call(self, inputs, training=False):
            return tf.nn.relu(self.normalize(self.dense(inputs), training=training))

    def tower(x, training, reuse=None):
        with tf1.variable_scope("tower", reuse=reuse):
            for index in range(2):
                x = Block(16, index, name=f"block_{index}")(x, training=training)
            return tf1.layers.dense(x, 1, kernel_initializer=tf1.initializers.he_normal(seed=9))

    if __name__ == "__main__":
        parser = argparse.ArgumentParser()
        parser.add_argument("--folder")
        options = parser.parse_args()
        features, target = tf1.placeholder(tf.float32, [None, 5]), tf1.placeholder(tf.float32, [None, 1])
        loss = tf1.losses.mean_squared_error(target, tower(features, True))
        served = tower(features, False, reuse=True)
        train_op = tf1.train.AdamOptimizer(0.01, epsilon=0.01).minimize(loss, tf1.train.get_or_create_global_step())
        update_ops = tf1.get_collection(tf1.GraphKeys.UPDATE_OPS)
        train_op = tf.group([train_op, update_ops])
        random = np.random.RandomState(0)
        with tf1.train.MonitoredTrainingSession(checkpoint_dir=options.folder, save_checkpoint_steps=6) as session:
            for _ in range(12):
                x = random.normal(3.0, 2.0, (32, 5))
                feed = {features: x, target: np.sin(x).sum(1, keepdims=True)}
                print("LOSS", session.run([loss, train_op], feed)[0])
        with tf1.Session() as session:
            tf1.train.Saver().restore(session, tf1.train.latest_checkpoint(options.folder))
            print("LOGITS", *session.run(served, {features: np.arange(10).reshape(2, 5)}).ravel())
        print("NAMES", *(variable.op.name for variable in tf1.global_variables()))
        print("LAYER", tf1.layers.BatchNormalization.__module__)
"""


def lines(*command: str, folder: pathlib.Path) -> dict[str, list[str]]:
    """What a program prints, by its first word."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    if command[0] != "-m":  # the program alone
        environment["TF_USE_LEGACY_KERAS"] = "1"
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = {}
    for word, rest in re.findall(r"^([A-Z]+) (.*)$", done.stdout, re.MULTILINE):
        found.setdefault(word, []).extend(rest.split())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("program", "script"), [(FLAT, ["program.py"]), (CLASSES, ["-m", "program"])])
def test_a_program_comes_to_the_numbers_of_the_original(
    program: str, script: list[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    ours = lines("-m", "batchnorm", "run", *script, "--folder", str(tmp_path / "ours"), folder=tmp_path)
    theirs = lines("program.py", "--folder", str(tmp_path / "theirs"), folder=tmp_path)
    assert ours.pop("LAYER") == ["batchnorm.tensorflow.layer"]
    assert theirs.pop("LAYER") == ["tf_keras.src.legacy_tf_layers.normalization"]
    assert ours["NAMES"] == theirs["NAMES"]
    assert len(ours["LOSS"]) == 12
    for word in ("LOSS", "LOGITS"):
        np.testing.assert_allclose(np.array(ours[word], float), np.array(theirs[word], float), rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*layer.updates")  # the original's own deprecation
@pytest.mark.parametrize("how", ["passed on", "left out", "sequential"])
def test_a_layer_in_a_model_of_keras_trains_with_it(how: str, original: Any) -> None:
    keras = importlib.import_module("tf_keras")
    x = np.random.default_rng(0).normal(3.0, 2.0, (16, 3)).astype(np.float32)

    def model(module: Any) -> Any:
        layer = module.BatchNormalization(momentum=0.5)
        last = keras.layers.Dense(1, kernel_initializer="ones")
        of_keras = keras.layers.BatchNormalization(momentum=0.5)
        if how == "sequential":  # the original's is refused there
            return keras.Sequential([layer if module is batchnorm.tensorflow else of_keras, last])

        class Model(keras.Model):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.normalize, self.last = layer, last

            def call(self, inputs: Any, training: Any = False) -> Any:
                return self.last(self.normalize(inputs, **({"training": training} if how == "passed on" else {})))

        return Model()

    found = []
    for module in (batchnorm.tensorflow, original):
        made = model(module)
        made.compile("sgd", "mse")
        made.fit(x, np.ones((16, 1)), epochs=2, batch_size=16, verbose=0)
        found.append([*made.get_weights(), made.predict(x[:3], verbose=0), made(x[:3]).numpy()])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_symbolic_inputs_of_keras_are_refused_for_they_would_lose_the_variables() -> None:
    for package in ("tf_keras", "keras"):
        symbol = importlib.import_module(package).Input((3,))
        layer = BatchNormalization()
        with pytest.raises(TypeError, match=f"symbolic input of Keras.*{layer.name}"):
            layer(symbol)
        assert not layer.built
