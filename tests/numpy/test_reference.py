"""Training and inference, against the oracle of loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from batchnorm.numpy import BatchNormalization
from tests.oracle import Oracle

from .cases import Case, cases, near, same_state


@pytest.mark.slow
@settings(max_examples=300)
@given(cases())
def test_training_and_then_inference_are_those_of_the_oracle(case: Case) -> None:
    layer, oracle = case.layer(), case.oracle()
    *training, last = case.shapes
    for step, shape in enumerate(training):
        x = case.x(shape, step)
        y = layer(x, training=True)
        assert y.shape == shape
        assert y.dtype == x.dtype
        near(y, oracle.train(x.astype(np.float64)), case.dtype)
        same_state(layer, oracle, len(shape), case.kept)
    x = case.x(last, len(training))
    y = layer(x)
    assert y.dtype == x.dtype
    near(y, oracle.infer(x.astype(np.float64)), case.dtype)
    same_state(layer, oracle, len(last), case.kept)


@given(cases(steps=2, most=100))
def test_training_again_from_the_same_state_gives_the_same_and_leaves_the_input_alone(case: Case) -> None:
    x = case.x(case.shapes[0], 0)
    given = x.copy()
    outcomes = []
    for _ in range(2):
        layer = case.layer()
        y = layer(x, training=True)
        outcomes.append([y.tobytes(), *(value.tobytes() for value in layer.variables.values())])
    assert outcomes[0] == outcomes[1]
    assert x.tobytes() == given.tobytes()


@given(cases(sizes=(1, 2, 3), steps=2, most=60))
def test_without_trainable_a_layer_still_normalizes_by_the_batch_and_keeps_its_statistics(case: Case) -> None:
    layer, oracle = case.layer(), case.oracle()
    layer.trainable = False
    for step, shape in enumerate(case.shapes):
        x = case.x(shape, step)
        y = layer(x, training=True)
        wide = x.astype(np.float64)
        corrections = oracle.corrections(oracle.averages(oracle.moments(wide)))
        near(y, oracle.output(wide, corrections, oracle.adjust(shape)), case.dtype)
        same_state(layer, oracle, len(shape), case.kept)


@given(cases(sizes=(2, 3, 5), steps=2, most=100, dtypes=("float64", "float32")))
def test_nan_in_one_feature_stays_in_that_feature(case: Case) -> None:
    clean, dirty = case.layer(), case.layer()
    x = case.x(case.shapes[0], 0)
    spoilt = x.copy()
    spoilt.flat[0] = np.nan
    oracle = case.oracle()
    feature = np.ones(x.shape, bool)
    feature[tuple(0 if axis in oracle.axes else slice(None) for axis in range(x.ndim))] = False
    y, other = clean(x, training=True), dirty(spoilt, training=True)
    np.testing.assert_array_equal(other[feature], y[feature])
    assert np.isnan(other.flat[0])
    for name, kept in clean.variables.items():
        np.testing.assert_array_equal(dirty.variables[name].flat[1:], kept.flat[1:])
    assert np.isnan(dirty.moving_mean.flat[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"renorm": True}, {"virtual_batch_size": 4}], ids=str)
def test_features_that_are_not_finite_keep_their_averages_and_others_move(options: dict[str, Any], dtype: Any) -> None:
    x = np.random.default_rng(0).normal(3.0, 1.0, (16, 3)).astype(dtype)
    layer, twin = BatchNormalization(skip_nonfinite=True, **options), BatchNormalization(**options)
    layer(x, training=True)
    twin(x, training=True)
    before = {name: value.copy() for name, value in layer.variables.items()}
    for name, value in twin.variables.items():
        np.testing.assert_allclose(before[name], value, rtol=1e-6)
    x[5, 1] = np.inf
    with np.errstate(invalid="ignore"):
        y = layer(x, training=True)
        twin(x, training=True)
    assert np.isfinite(y[:, [0, 2]]).all()
    for name, value in layer.variables.items():
        if name in ("gamma", "beta"):
            continue
        assert (value[..., 1] == before[name][..., 1]).all()
        assert not np.isfinite(twin.variables[name][..., 1]).any()
        np.testing.assert_allclose(value[..., [0, 2]], twin.variables[name][..., [0, 2]], rtol=1e-6)
        assert (value[..., [0, 2]] != before[name][..., [0, 2]]).all()


def test_inference_takes_a_batch_that_does_not_divide() -> None:
    x = np.random.default_rng(0).normal(2.0, 3.0, (12, 2, 3))
    layer = BatchNormalization(virtual_batch_size=4, momentum=0.0)
    oracle = Oracle.build(x.shape, virtual_batch_size=4, momentum=0.0)
    near(layer(x, training=True), oracle.train(x), "float64")
    for samples in (1, 3, 5, 7, 11):
        near(layer(x[:samples]), oracle.infer(x[:samples]), "float64")


def test_sample_i_is_normalized_with_the_samples_i_plus_multiples_of_the_number_of_virtual_batches() -> None:
    x = np.random.default_rng(0).normal(size=(6, 1))
    y = BatchNormalization(virtual_batch_size=2, epsilon=0.0)(x, training=True)
    for i, j in ((0, 3), (1, 4), (2, 5)):
        assert sorted(y[[i, j], 0].round(9).tolist()) == [-1.0, 1.0]
        assert (y[i, 0] > y[j, 0]) == (x[i, 0] > x[j, 0])


@pytest.mark.parametrize("virtual_batch_size", [None, 4])
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 2, 3), (4, 0, 3), (0, 0, 3)])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients_and_moves_nothing(
    shape: tuple[int, ...], renorm: bool, virtual_batch_size: int | None
) -> None:
    layer = BatchNormalization(renorm=renorm, virtual_batch_size=virtual_batch_size, momentum=0.5)
    layer(np.random.default_rng(0).normal(size=(8, *(max(size, 1) for size in shape[1:]))), training=True)
    before = {name: value.copy() for name, value in layer.variables.items()}
    y, gradient = layer.vjp(np.empty(shape), training=True)
    assert y.shape == shape
    assert {name: value.tolist() for name, value in layer.variables.items()} == {
        name: value.tolist() for name, value in before.items()
    }
    gradients = gradient(np.empty(shape))
    assert gradients.inputs.shape == shape
    for one in (gradients.gamma, gradients.beta):
        assert one is not None
        assert not one.any()


@pytest.mark.parametrize("virtual_batch_size", [None, 4])
def test_an_empty_batch_in_inference_gives_an_empty_output(virtual_batch_size: int | None) -> None:
    layer = BatchNormalization(virtual_batch_size=virtual_batch_size)
    assert layer(np.empty((0, 3), np.float32)).shape == (0, 3)
