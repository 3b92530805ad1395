"""Types, shapes and initial values of the variables, and what regularizers and constraints do with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.numpy import BatchNormalization

from .cases import DTYPES, INITIALIZED, Array


@pytest.mark.parametrize(
    ("given", "kept"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_variables_have_the_type_of_the_first_input_and_float32_at_least(given: str, kept: str) -> None:
    layer = BatchNormalization(renorm=True)
    layer(np.ones((2, 3), DTYPES[given]), training=True)
    assert {value.dtype.name for value in layer.variables.values()} == {kept}


def test_a_type_that_is_asked_for_is_that_of_the_variables_whatever_the_input() -> None:
    layer = BatchNormalization(dtype=np.float64)
    y = layer(np.array([[1.0], [3.0]], np.float32), training=True)
    assert y.dtype == np.float32
    assert layer.moving_mean.dtype == np.float64
    layer.load({name: value.astype(np.float32) for name, value in layer.variables.items()})
    assert layer.moving_mean.dtype == np.float64


def test_several_axes_and_virtual_batches_have_the_shapes_of_their_checkpoints() -> None:
    for options, shape in (
        ({"axis": (1, 3)}, (1, 5, 1, 3)),
        ({"axis": -1, "virtual_batch_size": 2}, (1, 1, 1, 1, 3)),
        ({"axis": [-1, 1], "virtual_batch_size": 2}, (1, 1, 5, 1, 3)),
        ({"axis": [1]}, (5,)),
    ):
        layer = BatchNormalization(**options)
        layer.build((None, 5, 4, 3))
        assert {value.shape for value in layer.variables.values()} == {shape}


@pytest.mark.parametrize("name", INITIALIZED)
@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        ("zeros", [0.0, 0.0, 0.0]),
        ("ones", [1.0, 1.0, 1.0]),
        (0.25, [0.25, 0.25, 0.25]),
        (2, [2.0, 2.0, 2.0]),
        (np.float32(0.5), [0.5, 0.5, 0.5]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        (np.array([1, 2, 3]), [1.0, 2.0, 3.0]),
        (lambda shape, dtype: np.arange(3, dtype=dtype).reshape(shape), [0.0, 1.0, 2.0]),
        (lambda shape, dtype: 4, [4.0, 4.0, 4.0]),
        (np.ones, [1.0, 1.0, 1.0]),
    ],
    ids=lambda part: str(part)[:12],
)
def test_an_initializer_may_be_a_name_a_number_an_array_or_a_function(
    name: str, initializer: Any, expected: list[float]
) -> None:
    options: dict[str, Any] = {f"{name}_initializer": initializer}
    layer = BatchNormalization(**options)
    layer.build((None, 3))
    assert layer.variables[name].tolist() == expected
    assert layer.variables[name].dtype == np.float32


def test_the_statistics_of_renorm_begin_where_the_moving_ones_do() -> None:
    layer = BatchNormalization(
        renorm=True, moving_mean_initializer=[1.0, 2.0], moving_variance_initializer=[4.0, 9.0], axis=(0, 1)
    )
    layer.build((1, 2))
    assert layer.variables["renorm_mean"].tolist() == [[1.0, 2.0]]
    assert layer.variables["renorm_stddev"].tolist() == [[2.0, 3.0]]
    assert layer.variables["moving_stddev"].tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("axis", [(1, 2), -1])
def test_an_initial_array_is_not_shared_with_the_layer(axis: Any) -> None:
    initial = np.zeros((1, 2, 3) if axis == (1, 2) else 3, np.float32)
    layer = BatchNormalization(axis=axis, moving_mean_initializer=initial)
    layer(np.ones((4, 2, 3), np.float32), training=True)
    layer.moving_mean[...] = 7
    assert not initial.any()


def test_an_initial_array_is_taken_as_it_was_given() -> None:
    initial = np.full(3, 0.5)
    layer = BatchNormalization(gamma_initializer=initial)
    initial *= 5
    layer.build((None, 3))
    assert layer.gamma is not None
    assert layer.gamma.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["gamma", "moving_mean"])
def test_variables_in_another_order_of_memory_are_taken(name: str) -> None:
    # Of two axes variables have shape (1, 5, 3), which Fortran's order and broadcasting lay out otherwise.
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    value = np.asfortranarray(np.arange(15.0, dtype=np.float32).reshape(1, 5, 3))
    layer, twin = (BatchNormalization(axis=[1, 2]) for _ in range(2))
    for each, given in ((layer, value), (twin, np.ascontiguousarray(value))):
        each.build(x.shape)
        each.load({**each.variables, name: given})
    np.testing.assert_array_equal(layer(x, training=True), twin(x, training=True))
    rows = BatchNormalization(
        axis=[1, 2], gamma_initializer=np.arange(1.0, 4.0), gamma_constraint=lambda g: np.broadcast_to(2.0, g.shape)
    )
    assert rows(x, training=True).shape == x.shape
    rows.constrain()
    assert rows(x, training=True).shape == x.shape
    wrong = BatchNormalization(gamma_constraint=lambda gamma: np.array(2.0))
    wrong(x)
    with pytest.raises(ValueError, match=r"gamma must have shape \(3,\); received shape \(\)"):
        wrong.constrain()


def test_losses_are_the_penalties_of_the_present_parameters() -> None:
    layer = BatchNormalization(
        gamma_initializer=[1.0, -2.0],
        beta_initializer=3.0,
        gamma_regularizer=lambda gamma: 0.5 * float((gamma**2).sum()),
        beta_regularizer=lambda beta: float(beta.sum()),
    )
    assert layer.losses == []
    layer.build((None, 2))
    assert layer.losses == [2.5, 6.0]
    layer.variables["gamma"] = np.zeros(2)
    assert layer.losses == [0.0, 6.0]


def test_a_parameter_that_is_switched_off_has_no_penalty_and_no_constraint() -> None:
    def never(value: Array) -> Array:
        raise AssertionError("there is nothing to call this for")

    layer = BatchNormalization(
        scale=False,
        center=False,
        gamma_regularizer=never,
        beta_regularizer=never,
        gamma_constraint=never,
        beta_constraint=never,
    )
    layer(np.ones((2, 2)), training=True)
    layer.constrain()
    assert layer.losses == []
    assert layer.gamma is None
    assert layer.beta is None


def test_constrain_projects_the_parameters_and_keeps_their_type() -> None:
    layer = BatchNormalization(
        gamma_initializer=[0.5, -2.0],
        beta_initializer=[3.0, -3.0],
        gamma_constraint=lambda gamma: np.maximum(gamma, 0),
        beta_constraint=lambda beta: np.clip(beta.astype(np.float64), -1, 1),
    )
    layer(np.ones((2, 2), np.float32), training=True)
    assert layer.variables["gamma"].tolist() == [0.5, -2.0]
    layer.constrain()
    for value, expected in ((layer.gamma, [0.5, 0.0]), (layer.beta, [1.0, -1.0])):
        assert value is not None
        assert value.tolist() == expected
        assert value.dtype == np.float32


def test_what_a_constraint_returns_is_not_shared_with_the_layer() -> None:
    mine = np.full(2, 3.0)
    layer = BatchNormalization(gamma_constraint=lambda gamma: mine)
    layer.build((None, 2), np.float64)
    layer.constrain()
    mine *= 5
    assert layer.gamma is not None
    assert layer.gamma.tolist() == [3.0, 3.0]
