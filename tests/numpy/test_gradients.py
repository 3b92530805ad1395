"""Gradients, against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from batchnorm.numpy import BatchNormalization, Gradients
from tests.oracle import Oracle, Pair, differences

from .cases import Array, Case, cases, near


def loaded(case: Case) -> tuple[BatchNormalization, Oracle]:
    """The layer and the oracle of a case, with every variable drawn, also those of renorm."""
    layer, oracle = case.layer(), case.oracle()
    rng = np.random.default_rng([case.seed, 99])
    for name, value in oracle.variables.items():
        low, high = (0.01, 2.0) if name.endswith(("variance", "stddev")) else (-1.5, 1.5)
        oracle.variables[name] = rng.uniform(low, high, value.shape)
    shape = oracle.parameter_shape(len(case.shapes[0]))
    layer.load({name: value.reshape(shape) for name, value in oracle.variables.items()})
    return layer, oracle


def check_gradients(
    gradients: Gradients, oracle: Oracle, x: Array, pair: Pair | None, loss: Callable[[Array, Pair | None], float]
) -> None:
    """Compare with finite differences of `loss` of the input, the parameters of `oracle` and the adjustment."""
    parameter_shape = oracle.parameter_shape(x.ndim)

    def by_parameter(name: str) -> Callable[[Array], float]:
        def function(at: Array) -> float:
            before, oracle.variables[name] = oracle.variables[name], at
            value = loss(x, pair)
            oracle.variables[name] = before
            return value

        return function

    def close(actual: Array | None, expected: Array) -> None:
        assert actual is not None
        assert actual.shape == expected.shape
        allowed = 1e-6 * max(1.0, np.abs(expected).max(initial=0.0))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=allowed)

    close(gradients.inputs, differences(lambda at: loss(at, pair), x))
    for name in ("gamma", "beta"):
        actual = getattr(gradients, name)
        if name in oracle.variables:
            close(actual, differences(by_parameter(name), oracle.variables[name]).reshape(parameter_shape))
        else:
            assert actual is None
    if pair is None:
        assert gradients.adjustment is None
    else:
        scale, bias = pair
        assert gradients.adjustment is not None
        close(gradients.adjustment[0], differences(lambda at: loss(x, (at, bias)), scale))
        close(gradients.adjustment[1], differences(lambda at: loss(x, (scale, at)), bias))


def weights(case: Case) -> Array:
    return np.random.default_rng([case.seed, 7]).normal(size=case.shapes[0])


GRADIENT_CASES = cases(sizes=(1, 2, 3), most=18, steps=1, dtypes=("float64",))


@given(GRADIENT_CASES)
def test_gradients_in_training_are_those_of_finite_differences_with_r_and_d_held(case: Case) -> None:
    layer, oracle = loaded(case)
    x, dy = case.x(case.shapes[0], 0), weights(case)
    pair = oracle.adjust(x.shape)
    corrections = oracle.corrections(oracle.averages(oracle.moments(x)))

    def loss(at: Array, adjustment: Pair | None) -> float:
        return float((oracle.output(at, corrections, adjustment) * dy).sum())

    y, gradient = layer.vjp(x, training=True)
    near(y, oracle.output(x, corrections, pair), "float64")
    check_gradients(gradient(dy), oracle, x, pair, loss)


@given(GRADIENT_CASES)
def test_gradients_in_inference_are_those_of_finite_differences(case: Case) -> None:
    layer, oracle = loaded(case)
    x, dy = case.x(case.shapes[0], 0), weights(case)
    y, gradient = layer.vjp(x)
    near(y, oracle.infer(x), "float64")
    check_gradients(gradient(dy), oracle, x, None, lambda at, _: float((oracle.infer(at) * dy).sum()))


@given(cases(most=60, steps=1))
def test_gradients_have_the_shapes_and_types_of_what_they_belong_to(case: Case) -> None:
    layer = case.layer()
    x = case.x(case.shapes[0], 0)
    for training in (True, False):
        y, gradient = layer.vjp(x, training)
        inputs, gamma, beta, adjustment = gradient(np.ones_like(y))
        assert (inputs.shape, inputs.dtype) == (x.shape, x.dtype)
        for parameter, own in ((layer.gamma, gamma), (layer.beta, beta)):
            assert (parameter is None) == (own is None)
            if parameter is not None and own is not None:
                assert (own.shape, own.dtype) == (parameter.shape, parameter.dtype)
        if training and case.options["adjustment"] is not None:
            assert adjustment is not None
            shapes = [np.shape(one) for one in case.options["adjustment"](x.shape)]
            assert [one.shape for one in adjustment] == shapes
        else:
            assert adjustment is None


def test_the_gradient_is_that_of_the_call_even_after_the_layer_has_moved_on() -> None:
    x = np.random.default_rng(0).normal(size=(6, 2))
    for training in (True, False):
        layer = BatchNormalization(renorm=True, momentum=0.5, renorm_momentum=0.5)
        _, gradient = layer.vjp(x, training)
        before = gradient(x)
        layer(10 * x + 3, training=True)
        layer.load({name: value + 1 for name, value in layer.variables.items()})
        for one, other in zip(before[:3], gradient(x)[:3], strict=True):
            assert one is not None
            assert other is not None
            assert one.tolist() == other.tolist()


ADJUSTMENTS: dict[str, Any] = {
    "no adjustment": None,
    "by feature": (np.array([0.5, 1.5]), np.array([0.25, -0.25])),
    "by value": (np.linspace(0.5, 1.5, 12).reshape(6, 2), np.linspace(-1, 1, 12).reshape(6, 2)),
}


@pytest.mark.parametrize("adjusted", ADJUSTMENTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gradient_is_of_what_went_in_whatever_becomes_of_it(
    dtype: Any, fused: bool | None, training: bool, adjusted: str
) -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (6, 2)).astype(dtype)
    dy = x[::-1].copy()
    pair: Any = ADJUSTMENTS[adjusted] and tuple(value.copy() for value in ADJUSTMENTS[adjusted])
    layer = BatchNormalization(renorm=True, fused=fused, adjustment=pair and (lambda shape: pair))
    _, gradient = layer.vjp(x, training)
    expected = gradient(dy)
    for array in (x, *layer.variables.values(), *(pair or ())):
        array *= 5
    found = gradient(dy)
    for one, other in zip((*expected[:3], *(expected[3] or ())), (*found[:3], *(found[3] or ())), strict=True):
        assert one is not None
        assert other is not None
        assert one.tobytes() == other.tobytes()


def test_calling_without_a_gradient_copies_nothing_and_changes_nothing() -> None:
    x = np.random.default_rng(0).normal(size=(6, 2))
    x.flags.writeable = False
    for fused in (None, False):
        layer, other = BatchNormalization(fused=fused), BatchNormalization(fused=fused)
        assert layer(x, training=True).tobytes() == other.vjp(x, training=True)[0].tobytes()
        assert layer(x).tobytes() == other.vjp(x)[0].tobytes()


@pytest.mark.parametrize("adjusted", ADJUSTMENTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [None, False])
def test_gradients_share_no_memory_with_what_they_are_of(fused: bool | None, training: bool, adjusted: str) -> None:
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 2))
    pair = ADJUSTMENTS[adjusted]
    for scale in (True, False):
        layer = BatchNormalization(scale=scale, fused=fused, adjustment=pair and (lambda shape: pair))
        _, gradient = layer.vjp(x, training)
        *found, adjustment = gradient(dy)
        for one in (*found, *(adjustment or ())):
            for other in (x, dy, *layer.variables.values(), *(pair or ())):
                assert one is None or not np.shares_memory(one, other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("shape", [(24,), (), (1,), (4, 6), (6, 1), (1, 4), (3, 2, 4), (6, 4, 1)])
def test_a_gradient_of_another_shape_than_the_output_s_is_refused(
    shape: tuple[int, ...], fused: bool | None, training: bool
) -> None:
    _, gradient = BatchNormalization(fused=fused).vjp(np.ones((6, 4), np.float32), training)
    with pytest.raises(ValueError, match=r"^dy must have .* \(6, 4\); received") as caught:
        gradient(np.ones(shape))
    assert str(shape) in str(caught.value)


def test_gradients_are_summed_in_float64_as_all_arithmetic_is() -> None:
    # In float32 neither of the two large differences below can be told from its neighbours.
    layer = BatchNormalization(moving_mean_initializer=1.0, epsilon=0.0)
    _, gradient = layer.vjp(np.array([[3e7], [-3e7 + 4]], np.float32))
    gamma = gradient(np.ones((2, 1))).gamma
    assert gamma is not None
    assert gamma.tolist() == [2.0]
