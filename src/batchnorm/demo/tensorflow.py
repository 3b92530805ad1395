"""The experiments as a user of TensorFlow 1 writes them: a graph, placeholders, collections and a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from batchnorm.tensorflow import batch_normalization

from .digits import SAMPLERS, Digits
from .experiments import CONVOLUTIONS, Curve, Experiment

__all__ = ["run"]

v1 = tf.compat.v1


def run(experiment: Experiment, digits: Digits, seed: int, progress: Callable[[int], None]) -> Curve:
    """Train and test a network.

    Args:
        experiment: What to do.
        digits: The data.
        seed: Seed of the initial weights, of the batches and of the adjustment.
        progress: Called with the number of steps done since the last time.

    Returns:
        The test accuracy by step, in inference with the moving statistics.
    """
    with tf.Graph().as_default():
        v1.set_random_seed(seed)
        x = v1.placeholder(tf.float32, [None, *digits.train.images.shape[1:]], name="x")
        labels = v1.placeholder(tf.int64, [None], name="labels")
        training = v1.placeholder(tf.bool, [], name="training")
        rmax = v1.placeholder_with_default(1.0, [], name="rmax")
        dmax = v1.placeholder_with_default(0.0, [], name="dmax")

        logits = _network(x, _normalize(experiment, training, rmax, dmax))
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, axis=1), labels), tf.float32))
        descent = v1.train.GradientDescentOptimizer(experiment.learning_rate).minimize(loss)
        train = tf.group(descent, *v1.get_collection(v1.GraphKeys.UPDATE_OPS))

        batches = SAMPLERS[experiment.sampler](digits.train.labels, experiment.batch_size, np.random.default_rng(seed))
        clips = None if experiment.normalization is None else experiment.normalization.clips
        curve = []
        # With one thread each, sums are always taken in the same order, and several runs share the processors well.
        threads = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
        with v1.Session(config=threads) as session:
            session.run(v1.global_variables_initializer())
            done = 0
            for step in range(1, experiment.steps + 1):
                batch = next(batches)
                feed = {x: digits.train.images[batch], labels: digits.train.labels[batch], training: True}
                if clips is not None:
                    elapsed = step / experiment.steps
                    feed |= {rmax: clips.rmax.at(elapsed), dmax: clips.dmax.at(elapsed)}
                session.run(train, feed)
                if experiment.evaluated(step):
                    feed = {x: digits.test.images, labels: digits.test.labels, training: False}
                    curve.append((step, float(session.run(accuracy, feed))))
                    progress(step - done)
                    done = step
    return Curve(*zip(*curve, strict=True))


def _network(x: Any, normalize: Callable[[Any], Any] | None) -> Any:
    """Logits of images. With None there are biases instead of normalization."""
    for index, (channels, stride) in enumerate(CONVOLUTIONS, start=1):
        with v1.variable_scope(f"convolution_{index}"):
            kernel = v1.get_variable("kernel", [3, 3, x.shape[-1], channels], initializer=v1.initializers.he_normal())
            x = tf.nn.conv2d(x, kernel, strides=stride, padding="SAME")
            if normalize is None:
                x = tf.nn.bias_add(x, v1.get_variable("bias", [channels], initializer=v1.initializers.zeros()))
            else:
                x = normalize(x)
            x = tf.nn.relu(x)
    x = tf.reduce_mean(x, axis=[1, 2])
    with v1.variable_scope("dense"):
        kernel = v1.get_variable("kernel", [x.shape[-1], 10], initializer=v1.initializers.glorot_normal())
        return tf.matmul(x, kernel) + v1.get_variable("bias", [10], initializer=v1.initializers.zeros())


def _normalize(experiment: Experiment, training: Any, rmax: Any, dmax: Any) -> Callable[[Any], Any] | None:
    """Normalization as an experiment has it, or None for a network without it."""
    normalization = experiment.normalization
    if normalization is None:
        return None
    options: dict[str, Any] = {
        "training": training,
        "fused": True,
        "momentum": normalization.momentum,
        "virtual_batch_size": normalization.virtual_batch_size,
    }
    if normalization.clips is not None:
        options |= {
            "renorm": True,
            "renorm_clipping": {"rmin": 1 / rmax, "rmax": rmax, "dmax": dmax},
            "renorm_momentum": normalization.momentum,
        }
    if normalization.adjustment is not None:
        scale, bias = normalization.adjustment.scale, normalization.adjustment.bias
        options["adjustment"] = lambda shape: (
            tf.random.uniform(shape[-1:], *scale),
            tf.random.uniform(shape[-1:], *bias),
        )
    replicas = normalization.replicas
    if replicas is None:
        return lambda x: batch_normalization(x, **options)

    def apart(x: Any) -> Any:
        shares = tf.reshape(x, [-1, replicas, *x.shape[1:]])
        y = batch_normalization(shares, axis=[1, -1], center=False, scale=False, **options)
        gamma = v1.get_variable("gamma", [x.shape[-1]], initializer=v1.initializers.ones())
        beta = v1.get_variable("beta", [x.shape[-1]], initializer=v1.initializers.zeros())
        return tf.reshape(y * gamma + beta, [-1, *x.shape[1:]])

    return apart
