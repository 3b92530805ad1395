"""What counts into the statistics of the TensorFlow layer, beside loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from batchnorm.tensorflow import BatchNormalization, xla
from tests.oracle import Oracle

v1 = tf.compat.v1
LIMITS = {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_clipping": LIMITS},
    "virtual batches": {"virtual_batch_size": 3},
    "renorm and virtual batches, features first": {
        "axis": 1,
        "renorm": True,
        "renorm_clipping": LIMITS,
        "virtual_batch_size": 2,
    },
    "two axes apart": {"axis": [1, 3]},
    "renorm and two axes side by side": {"axis": [2, 3], "renorm": True},
    "adjustment by feature, features first": {"axis": 1, "renorm": True, "adjustment": (1, 3, 1, 1)},
    "adjustment by sample": {"renorm": True, "adjustment": (6, 1, 1, 1)},
}
MASKS = ("all", "some", "one", "nothing", "a group of nothing", "weights")
SHAPE = (6, 3, 4, 2)


def masks(kind: str, sizes: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(0)
    if kind == "weights":
        return rng.random(sizes) * (rng.random(sizes) < 0.7)
    if kind == "one":
        return np.arange(np.prod(sizes)).reshape(sizes) == 7
    if kind == "a group of nothing":
        return np.broadcast_to((np.arange(sizes[0]) % 2 > 0).reshape(-1, *[1] * (len(sizes) - 1)), sizes).copy()
    return rng.random(sizes) < {"all": 2.0, "some": 0.6, "nothing": -1.0}[kind]


def made(options: str, fused: bool | None) -> tuple[BatchNormalization, Oracle, Any]:
    """A layer in float64, the oracle of it, and the adjustment that both have."""
    given = {"momentum": 0.7, "renorm_momentum": 0.8, **OPTIONS[options]}
    axis, size = given.get("axis", -1), given.pop("adjustment", None)
    pair = None
    if size is not None:
        rng = np.random.default_rng(2)
        pair = rng.uniform(0.5, 1.5, size), rng.uniform(-0.5, 0.5, size)
        given["adjustment"] = lambda _: tuple(tf.constant(value) for value in pair)
    known = {key: given[key] for key in ("momentum", "renorm_momentum", "renorm", "virtual_batch_size") if key in given}
    oracle = Oracle.build(
        SHAPE,
        tuple(axis) if isinstance(axis, list) else axis,
        **known,
        **given.get("renorm_clipping", {}),
        adjustment=pair and (lambda _: pair),
    )
    return BatchNormalization(dtype="float64", fused=fused, **given), oracle, pair


@pytest.mark.parametrize("way", ["kernels", "composed", "kernels in a graph with a tensor"])
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_and_gradients_under_masks_are_those_of_loops(options: str, way: str) -> None:
    graph = way.endswith("tensor")
    layer, oracle, pair = made(options, True if graph else None if way == "kernels" else False)
    positions = tuple(size for at, size in enumerate(SHAPE) if at not in oracle.axes)
    rng = np.random.default_rng(1)
    layer.build(SHAPE)

    def step(x: Any, dy: Any, mask: Any, training: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training, mask=mask)
        return y, tape.gradient(y, [x, layer.gamma, layer.beta], dy)

    traced = tf.function(step) if graph else step
    for kind in (*MASKS, "some"):
        mask = masks(kind, positions)
        weights = mask.reshape([1 if at in oracle.axes else size for at, size in enumerate(SHAPE)]).astype(np.float64)
        x, dy = rng.normal(size=SHAPE) * 2 + 1, rng.normal(size=SHAPE) * (weights > 0)
        used = oracle.corrections(oracle.averages(oracle.moments(x, weights)))
        expected = oracle.gradients(x, dy, used, pair, weights)
        y, gradients = traced(tf.constant(x), tf.constant(dy), tf.constant(mask), tf.constant(True) if graph else True)
        served = way.startswith("kernels") and options != "adjustment by sample"
        assert graph or layer.kernel == ("cpu" if served else "composed")
        np.testing.assert_allclose(y, oracle.train(x, weights), rtol=1e-6, atol=1e-6)
        for found, right in zip(gradients, (expected.x, expected.gamma, expected.beta), strict=True):
            np.testing.assert_allclose(np.reshape(found, right.shape), right, rtol=1e-6, atol=1e-6)
        for name, value in oracle.variables.items():
            np.testing.assert_allclose(np.reshape(getattr(layer, name), value.shape), value, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(layer(x, mask=mask), oracle.infer(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "adjustment by sample"])
def test_derivatives_of_both_orders_are_those_of_the_composed_layer(options: str) -> None:
    rng = np.random.default_rng(1)
    x, dy, by = (tf.constant(rng.normal(size=SHAPE)) for _ in range(3))
    given: Any = OPTIONS[options].get("axis", -1)
    axes = {at % len(SHAPE) for at in (given if isinstance(given, list) else [given])}
    positions = tuple(size for at, size in enumerate(SHAPE) if at not in axes)

    def derivatives(layer: Any, mask: Any, signature: Any = None) -> Any:
        layer.build(SHAPE)

        def function(x: Any, dy: Any, mask: Any) -> Any:
            with tf.GradientTape() as outer:
                outer.watch([x, dy])
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = layer(x, training=True, mask=mask)
                first = inner.gradient(y, [x, layer.gamma, layer.beta], dy)
                scalar = tf.reduce_sum(first[0] * by) + tf.reduce_sum(first[1] ** 2)
            return y, *first, *outer.gradient(scalar, [x, dy, layer.gamma])

        return (function if signature is None else tf.function(function, signature))(x, dy, mask)

    for kind in MASKS:
        mask = tf.constant(masks(kind, positions))
        unknown = [tf.TensorSpec([None, *SHAPE[1:]], tf.float64)] * 2
        unknown.append(tf.TensorSpec([None] * len(positions), mask.dtype))
        right = derivatives(made(options, False)[0], mask)
        for signature in (None, unknown) if kind in ("a group of nothing", "weights") else (None,):
            layer = made(options, None)[0]
            found = derivatives(layer, mask, signature)
            assert layer.kernel == "cpu"
            for one, other in zip(found, right, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9, err_msg=kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_xla_and_sessions_give_what_the_kernels_give(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, mask = rng.normal(1.0, 2.0, (8, 5, 3)).astype(np.float32), rng.random((8, 5)) < 0.6
    near = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    layer = BatchNormalization(renorm=True, momentum=0.5)
    y = layer(tf.cast(x, dtype), training=True, mask=mask)
    assert layer.kernel == "cpu"
    expected = tf.cast(y, tf.float32).numpy()

    compiled = BatchNormalization(renorm=True, momentum=0.5)
    compiled.build((None, 5, 3))
    step = tf.function(lambda x, mask: compiled(x, training=True, mask=mask), jit_compile=True)
    result = step(tf.cast(x, dtype), mask)
    assert compiled.kernel == ("cpu" if xla.available() else "composed")
    np.testing.assert_allclose(tf.cast(result, tf.float32), expected, rtol=near, atol=near)
    np.testing.assert_allclose(compiled.moving_variance, layer.moving_variance, rtol=1e-5)

    with v1.Graph().as_default(), v1.Session() as session:
        inputs, of = v1.placeholder(dtype, [None, 5, 3]), v1.placeholder(tf.bool, [None, None])
        graph = BatchNormalization(renorm=True, momentum=0.5)
        outputs = tf.cast(graph(inputs, training=True, mask=of), tf.float32)
        assert graph.kernel == "cpu"
        session.run(v1.global_variables_initializer())
        result, _ = session.run([outputs, graph.updates], {inputs: x, of: mask})
        np.testing.assert_allclose(result, expected, rtol=near, atol=near)
        moved = session.run(graph.moving_variance)
    np.testing.assert_allclose(moved, layer.moving_variance.numpy(), rtol=1e-5)


@pytest.mark.parametrize("fused", [None, False])
def test_nan_under_the_mask_stays_there(fused: bool | None) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    mask = np.arange(8) < 6
    x[~mask] = np.nan
    layer = BatchNormalization(fused=fused)
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
