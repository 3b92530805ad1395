"""Where the layer departs from the original on purpose, and where the original cannot follow: against plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings

from batchnorm.tensorflow import BatchNormalization
from tests.oracle import Oracle, differences

from .cases import STEPS, TOLERANCE, Case, cases, run

v1 = tf.compat.v1


def initial(case: Case, name: str, default: float) -> float:
    initializer = case.options.get(f"{name}_initializer")
    return default if initializer is None else float(initializer.get_config()["value"])


def oracle_for(case: Case) -> Oracle:
    options = case.options
    axis = options["axis"]
    pair = case.adjustments()
    return Oracle.build(
        case.shape,
        tuple(axis) if isinstance(axis, list) else axis,
        center=options.get("center", True),
        scale=options.get("scale", True),
        renorm=options.get("renorm", False),
        initial={
            "gamma": initial(case, "gamma", 1.0),
            "beta": initial(case, "beta", 0.0),
            "moving_mean": initial(case, "moving_mean", 0.0),
            "moving_variance": initial(case, "moving_variance", 1.0),
        },
        momentum=options.get("momentum", 0.99),
        epsilon=options.get("epsilon", 1e-3),
        renorm_momentum=options.get("renorm_momentum", 0.99),
        virtual_batch_size=options.get("virtual_batch_size"),
        adjustment=None if pair is None else lambda shape: pair,
        **options.get("renorm_clipping", {}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_what_the_original_cannot_do_is_right_too(rank: int, eager: bool) -> None:
    @settings(max_examples=25)
    @given(cases(rank, eager, beyond=True))
    def compare(case: Case) -> None:
        seen = run(BatchNormalization, case, eager)
        oracle = oracle_for(case)
        batches, loss_weights = case.inputs()
        tolerance = TOLERANCE[case.dtype] * (1 if case.dtype != "float64" else 1e3)  # decay is rounded to float32
        for step, batch in enumerate(batches):
            wide, weights = np.asarray(batch, np.float64), np.asarray(loss_weights, np.float64)
            if step < STEPS:
                corrections = oracle.corrections(oracle.averages(oracle.moments(wide)))
                pair = oracle.adjust(wide.shape)

                def loss(x: Any, corrections: Any = corrections, pair: Any = pair, weights: Any = weights) -> float:
                    return float(np.sum(oracle.output(x, corrections, pair) * weights))

                if step == 0:
                    dx = np.asarray(seen["gradients"][0][0], np.float64)
                    expected = differences(loss, wide)
                    largest = max(1.0, float(np.abs(expected).max(initial=0)))
                    loose = max(TOLERANCE[case.dtype], 1e-5) * largest
                    np.testing.assert_allclose(dx, expected, rtol=0, atol=loose)
                expected = oracle.train(wide)
            else:
                expected = oracle.infer(wide)
            bound = tolerance * max(1.0, float(np.abs(expected).max(initial=0)))
            np.testing.assert_allclose(np.asarray(seen["outputs"][step][0], np.float64), expected, rtol=0, atol=bound)

    compare()


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"axis": [1, 2]}], ids="+".join)
def test_inference_takes_any_batch_whatever_the_virtual_batch_size(options: dict[str, Any]) -> None:
    layer = BatchNormalization(virtual_batch_size=4, **options)
    layer(tf.random.stateless_normal([8, 3, 2], [1, 2]), training=True)
    x = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    shape = layer.moving_mean.shape.as_list()[1:]
    mean, variance = (np.reshape(value, shape) for value in (layer.moving_mean, layer.moving_variance))
    np.testing.assert_allclose(layer(x), (x - mean) / np.sqrt(variance + 1e-3), atol=1e-5)
    with tf.Graph().as_default(), v1.Session() as session:
        layer = BatchNormalization(virtual_batch_size=4, **options)
        placeholder = v1.placeholder(tf.float32, [None, 3, 2])
        y = layer(placeholder, training=v1.placeholder_with_default(False, []))
        session.run(v1.global_variables_initializer())
        np.testing.assert_allclose(session.run(y, {placeholder: x}), x / np.sqrt(1.001), atol=1e-5)


def test_the_axis_is_never_changed_by_building() -> None:
    for axis in (-1, [1, -1], (2,)):
        layer = BatchNormalization(axis=axis, virtual_batch_size=2)
        given_back = layer.axis
        layer(tf.zeros([4, 3, 5]), training=True)
        assert layer.axis == given_back == (axis if isinstance(axis, int) else list(axis))


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": False},
        {"renorm": True},
        {"virtual_batch_size": 2},
        {"renorm": True, "virtual_batch_size": 2},
        {"adjustment": lambda shape: (tf.ones(shape[-1:]), tf.ones(shape[-1:]))},
        {"axis": [2, 3]},
        {"axis": 1},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("shape", [[0, 2, 2, 3], [4, 0, 2, 3]], ids=str)
def test_an_empty_batch_moves_nothing_and_has_no_gradient(
    options: dict[str, Any], unknown: bool, shape: list[int]
) -> None:
    if options.get("axis") == 1 and shape[1] == 0:
        shape = [0, 2, 0, 3]
    layer = BatchNormalization(**options)
    full = tf.random.stateless_normal([4, *[size or 2 for size in shape[1:]]], [1, 2])
    layer(full, training=True)
    before = layer.get_weights()

    def gradients(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**2)
        return y, *tape.gradient(loss, [x, layer.gamma, layer.beta])

    spec = [None if size == 0 else size for size in shape]
    run = tf.function(gradients, input_signature=[tf.TensorSpec(spec)]) if unknown else gradients
    y, dx, dgamma, dbeta = run(tf.zeros(shape))
    assert y.shape == dx.shape == shape
    assert not np.any(dgamma)
    assert not np.any(dbeta)
    np.testing.assert_equal(layer.get_weights(), before)
    assert layer(tf.zeros(shape)).shape == shape


def test_a_frozen_layer_still_normalizes_by_the_batch_and_keeps_its_moving_statistics() -> None:
    layer = BatchNormalization(trainable=False, renorm=True)
    x = np.random.default_rng(0).normal(5.0, 2.0, (64, 3)).astype(np.float32)
    layer.build([None, 3])
    start = {v.name: v.numpy() for v in layer.variables}
    layer(x, training=True)
    moved = {v.name.rpartition("/")[2] for v in layer.variables if (v.numpy() != start[v.name]).any()}
    # As the original does eagerly: renorm's own averages serve training, and go on.
    assert moved == {"renorm_mean:0", "renorm_stddev:0"}
    assert layer.trainable_variables == []
    plain = BatchNormalization(trainable=False)
    np.testing.assert_allclose(plain(x, training=True).numpy().mean(axis=0), np.zeros(3), atol=1e-5)


def test_the_stored_variance_is_unbiased_just_where_the_original_was_fused() -> None:
    x = np.random.default_rng(0).normal(size=(3, 1, 2, 4))

    def stored(dtype: str, **options: Any) -> Any:
        layer = BatchNormalization(momentum=0.0, dtype=dtype, **options)
        layer(tf.constant(x, dtype), training=True)
        return layer.moving_variance.numpy().reshape(-1), layer.kernel

    biased, unbiased = x.var(axis=(0, 1, 2)), x.var(axis=(0, 1, 2), ddof=1)
    fusible: list[dict[str, Any]] = [{}, {"fused": True}, {"axis": 3}, {"axis": [-1]}]
    for options in fusible:
        variance, kernel = stored("float32", **options)
        np.testing.assert_allclose(variance, unbiased, rtol=1e-5)
        assert kernel == "cpu"
    others: list[dict[str, Any]] = [{"fused": False}, {"virtual_batch_size": 3}, {"adjustment": lambda shape: (1, 0)}]
    for options in others:
        variance, kernel = stored("float32", **options)
        np.testing.assert_allclose(variance, biased, rtol=1e-5)
        assert kernel == ("composed" if options.get("fused") is False else "cpu")
    np.testing.assert_allclose(stored("float64")[0], biased, rtol=1e-6)
    np.testing.assert_allclose(stored("float32", axis=2)[0], x.var(axis=(0, 1, 3)), rtol=1e-5)


def test_one_value_per_feature_has_no_correction() -> None:
    layer = BatchNormalization(momentum=0.0)
    layer(tf.ones([1, 1, 1, 3]), training=True)
    np.testing.assert_allclose(layer.moving_variance, np.zeros(3))


def test_statistics_stay_right_where_the_mean_is_large_beside_the_spread() -> None:
    x = np.random.default_rng(0).normal(1e4, 1.0, (4096, 5, 4)).astype(np.float32)
    layer = BatchNormalization(momentum=0.0)
    layer(x, training=True)
    np.testing.assert_allclose(layer.moving_variance, x.astype(np.float64).var(axis=(0, 1)), rtol=1e-4)


def test_nan_stays_in_its_own_feature_and_group() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    x[2, 1] = np.nan
    y = BatchNormalization(virtual_batch_size=2)(x, training=True).numpy()
    assert np.argwhere(np.isnan(y)).tolist() == [[2, 1], [6, 1]]
