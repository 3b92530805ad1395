"""Without an option of ours, what Keras' layer gives: steps, gradients, averages, weights and masks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.keras import BatchNormalization

from .support import BACKEND, STOCK_RENORM, array, averages, step

LIMITS = {"rmin": 0.6, "rmax": 1.6, "dmax": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no scale": {"scale": False},
    "no offset": {"center": False},
    "other numbers": {"momentum": 0.7, "epsilon": 0.1},
    "renorm": {"renorm": True, "renorm_momentum": 0.7},
    "limited renorm": {"renorm": True, "renorm_momentum": 0.7, "renorm_clipping": LIMITS},
    "initializers": {
        "beta_initializer": "ones",
        "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.1, seed=1),
        "moving_mean_initializer": keras.initializers.RandomNormal(0.0, 0.1, seed=2),
        "moving_variance_initializer": keras.initializers.RandomUniform(0.5, 1.5, seed=3),
        **({"renorm": True} if STOCK_RENORM else {}),
    },
}
OPTIONS = {name: options for name, options in OPTIONS.items() if STOCK_RENORM or "renorm" not in options}
by_renorm = pytest.mark.parametrize("options", [{}, {"renorm": True}] if STOCK_RENORM else [{}], ids=str)
SHAPES = {
    "table": ((16, 4), -1),
    "image": ((6, 3, 5, 4), -1),
    "image first": ((6, 4, 3, 5), 1),
    "composed": ((6, 3, 4), -1),
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-6, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2, "float16": 4e-3}


def pair(**options: Any) -> tuple[Any, Any]:
    return BatchNormalization(**options), keras.layers.BatchNormalization(**options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_gradients_and_inference_are_those_of_keras(options: str, shape: str) -> None:
    sizes, axis = SHAPES[shape]
    fused = False if shape == "composed" else None
    rng = np.random.default_rng(0)
    theirs = keras.layers.BatchNormalization(axis=axis, **OPTIONS[options])
    ours = BatchNormalization(axis=axis, fused=fused, **OPTIONS[options])
    ours.build(sizes)
    theirs.build(sizes)
    assert [weight.name for weight in ours.weights] == [weight.name for weight in theirs.weights]
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for at in range(4):
        x, dy = (rng.normal(at, 2, sizes).astype("float32"), rng.normal(size=sizes).astype("float32"))
        found, expected = step(ours, x, dy), step(theirs, x, dy)
        np.testing.assert_allclose(found.y, expected.y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.dx, expected.dx, rtol=1e-3, atol=1e-5)
        for name, value in expected.weights.items():
            np.testing.assert_allclose(found.weights[name], value, rtol=1e-3, atol=2e-5)
        for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), rtol=1e-4, atol=1e-5)
    again = keras.layers.BatchNormalization(axis=axis, **OPTIONS[options])
    again.build(sizes)
    again.set_weights(ours.get_weights())
    np.testing.assert_allclose(array(again(x)), array(ours(x)), rtol=1e-4, atol=1e-5)
    ours.set_weights(theirs.get_weights())


@by_renorm
def test_boolean_masks_count_as_with_keras(options: dict[str, Any]) -> None:
    ours, theirs = pair(**options)
    rng = np.random.default_rng(0)
    for at in range(3):
        x, dy = (rng.normal(at, 2, (6, 5, 4)).astype("float32"), rng.normal(size=(6, 5, 4)).astype("float32"))
        mask = rng.uniform(size=(6, 5)) > 0.3
        dy[~mask] = 0  # what is masked reaches the gradients of the rest with Keras
        mask = ops.convert_to_tensor(mask)
        found, expected = step(ours, x, dy, mask=mask), step(theirs, x, dy, mask=mask)
        np.testing.assert_allclose(found.y, expected.y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.dx, expected.dx, rtol=1e-3, atol=2e-5)
        for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    broad = ops.convert_to_tensor(np.array([[1], [0], [1], [1], [0], [1]], bool))
    for layer in (ours, theirs):
        layer(x, training=True, mask=broad)
    np.testing.assert_allclose(averages(ours)["moving_mean"], averages(theirs)["moving_mean"], rtol=1e-4, atol=1e-6)


@by_renorm
@pytest.mark.parametrize("policy", TOLERANCE)
def test_policies_give_the_types_of_keras_and_its_numbers(policy: str, options: dict[str, Any]) -> None:
    if policy == "float64" and BACKEND == "jax":
        pytest.skip("JAX computes in float32 unless told before")
    ours, theirs = pair(dtype=policy, momentum=0.5, **options)
    rng, atol = np.random.default_rng(0), TOLERANCE[policy]
    for _ in range(3):
        x, dy = (rng.normal(1, 2, (8, 4, 3, 5)).astype("float32"), rng.normal(size=(8, 4, 3, 5)).astype("float32"))
        given = x.astype("float64") if policy == "float64" else x
        found, expected = step(ours, given, dy.astype(given.dtype)), step(theirs, given, dy.astype(given.dtype))
        np.testing.assert_allclose(found.y, expected.y, rtol=10 * atol, atol=atol)
        np.testing.assert_allclose(found.dx, expected.dx, rtol=10 * atol, atol=3 * atol)
    assert [str(w.dtype) for w in ours.weights] == [str(w.dtype) for w in theirs.weights]
    assert ours(x).dtype == theirs(x).dtype
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(one.astype("float32"), other.astype("float32"), rtol=10 * atol, atol=atol)


def test_integers_are_taken_as_keras_takes_them() -> None:
    x = np.arange(12, dtype="int32").reshape(4, 3)
    ours, theirs = pair()
    for training in (True, False):
        one, other = ours(x, training=training), theirs(x, training=training)
        assert one.dtype == other.dtype
        np.testing.assert_allclose(array(one), array(other), rtol=1e-5, atol=1e-5)


def test_no_features_give_no_outputs_as_with_keras() -> None:
    for layer in pair():
        for training in (True, False):
            assert array(layer(np.ones((2, 0), "float32"), training=training)).shape == (2, 0)


@by_renorm
def test_trainable_false_is_inference_and_moves_nothing(options: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(3, 2, (8, 4)).astype("float32")
    ours, theirs = pair(trainable=False, **options)
    for layer in (ours, theirs):
        layer.build(x.shape)
        before = layer.get_weights()
        np.testing.assert_allclose(array(layer(x, training=True)), x / np.sqrt(1.001), rtol=1e-5)
        assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))
        assert layer.trainable_weights == []
        layer.trainable = True
        layer(x, training=True)
        assert not np.array_equal(layer.get_weights()[2], before[2])


def test_regularizers_and_constraints_are_those_of_the_weights() -> None:
    for layer in pair(gamma_regularizer="l2", beta_regularizer=keras.regularizers.L1(0.1), gamma_constraint="non_neg"):
        layer.build((None, 3))
        layer.beta.assign([1.0, -2.0, 3.0])
        assert [round(float(array(loss)), 4) for loss in layer.losses] == [0.03, 0.6]
        assert isinstance(layer.gamma.constraint, keras.constraints.NonNeg)
        assert layer.beta.constraint is None


def test_it_is_found_by_what_looks_for_keras_layer() -> None:
    assert isinstance(BatchNormalization(), keras.layers.BatchNormalization)
    assert BatchNormalization().supports_masking
    assert BatchNormalization().name.startswith("batch_normalization")
