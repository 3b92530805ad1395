"""What counts into the statistics of the TensorFlow layer, beside loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from batchnorm.tensorflow import BatchNormalization
from tests.oracle import Oracle

v1 = tf.compat.v1
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}},
    "virtual batches": {"virtual_batch_size": 3},
    "two axes": {"axis": [1, 3]},
    "features first": {"axis": 1},
}
MASKS = ("some", "nothing", "a group of nothing", "weights")
SHAPE = (6, 3, 4, 2)


def masks(kind: str, sizes: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(0)
    if kind == "weights":
        return rng.random(sizes) * (rng.random(sizes) < 0.7)
    if kind == "a group of nothing":
        return np.broadcast_to((np.arange(sizes[0]) % 2 > 0).reshape(-1, *[1] * (len(sizes) - 1)), sizes).copy()
    return rng.random(sizes) < {"some": 0.6, "nothing": -1.0}[kind]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph with a tensor"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_and_gradients_under_a_mask_are_those_of_loops(options: str, kind: str, graph: bool) -> None:
    given = {"momentum": 0.7, "renorm_momentum": 0.8, **OPTIONS[options]}
    axis = given.get("axis", -1)
    layer = BatchNormalization(dtype="float64", **given)
    known = {key: given[key] for key in ("momentum", "renorm_momentum", "renorm", "virtual_batch_size") if key in given}
    oracle = Oracle.build(
        SHAPE, tuple(axis) if isinstance(axis, list) else axis, **known, **given.get("renorm_clipping", {})
    )
    positions = tuple(size for at, size in enumerate(SHAPE) if at not in oracle.axes)
    mask = masks(kind, positions)
    weights = mask.reshape([1 if at in oracle.axes else size for at, size in enumerate(SHAPE)]).astype(np.float64)
    rng = np.random.default_rng(1)

    def call(x: Any, mask: Any, training: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training, mask=mask)
        return y, tape

    @tf.function
    def traced(x: Any, dy: Any, mask: Any, training: Any) -> Any:
        y, tape = call(x, mask, training)
        return y, tape.gradient(y, [x, layer.gamma, layer.beta], dy)

    if graph:
        layer.build(SHAPE)
    for _ in range(2):
        x, dy = rng.normal(size=SHAPE) * 2 + 1, rng.normal(size=SHAPE) * (weights > 0)
        used = oracle.corrections(oracle.averages(oracle.moments(x, weights)))
        expected = oracle.gradients(x, dy, used, None, weights)
        if graph:
            y, gradients = traced(tf.constant(x), tf.constant(dy), tf.constant(mask), tf.constant(True))
        else:
            leaf = tf.constant(x)
            y, tape = call(leaf, mask, True)
            gradients = tape.gradient(y, [leaf, layer.gamma, layer.beta], tf.constant(dy))
        np.testing.assert_allclose(y, oracle.train(x, weights), rtol=1e-6, atol=1e-6)
        for found, right in zip(gradients, (expected.x, expected.gamma, expected.beta), strict=True):
            np.testing.assert_allclose(np.reshape(found, right.shape), right, rtol=1e-6, atol=1e-6)
        for name, value in oracle.variables.items():
            np.testing.assert_allclose(np.reshape(getattr(layer, name), value.shape), value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer(x, mask=mask), oracle.infer(x), rtol=1e-6, atol=1e-6)


def test_nan_under_the_mask_stays_there() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    mask = np.arange(8) < 6
    x[~mask] = np.nan
    layer = BatchNormalization()
    given = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(given)
        y = layer(given, training=True, mask=mask)
    dx, dgamma = tape.gradient(y, [given, layer.gamma], tf.constant(np.ones((8, 3)) * mask[:, None], tf.float32))
    assert np.isfinite(y.numpy()[mask]).all()
    assert np.isfinite(dx.numpy()[mask]).all()
    assert np.isfinite(dgamma.numpy()).all()
    assert np.isfinite(layer.moving_variance.numpy()).all()


def test_the_variance_that_is_stored_under_a_mask_is_the_biased_one() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)
    masked, plain = BatchNormalization(momentum=0.0), BatchNormalization(momentum=0.0)
    masked(x, training=True, mask=np.ones((4, 3, 2), bool))
    plain(x, training=True)  # of rank 4, which the original fuses
    np.testing.assert_allclose(masked.moving_variance, x.var((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(plain.moving_variance, x.var((0, 1, 2)) * 24 / 23, rtol=1e-5)


@pytest.mark.parametrize("fused", [None, False])
def test_a_static_batch_that_does_not_divide_is_refused_when_a_tensor_says_training(fused: bool | None) -> None:
    layer = BatchNormalization(virtual_batch_size=4, fused=fused)
    layer.build((None, 3))

    @tf.function
    def call(x: Any, training: Any) -> Any:
        return layer(x, training=training)

    x = tf.ones([10, 3])
    call(x, tf.constant(False))
    before = layer.moving_mean.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match="virtual_batch_size must divide"):
        call(x, tf.constant(True))
    np.testing.assert_array_equal(layer.moving_mean.numpy(), before)
