"""Bad input is refused by name, before a variable is made or a statistic touched."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from batchnorm.tensorflow import BatchNormalization, Layer, batch_normalization

v1 = tf.compat.v1
FUNCTIONS = [
    *(
        f"{parameter}_{kind}"
        for parameter in ("beta", "gamma")
        for kind in ("initializer", "regularizer", "constraint")
    ),
    "moving_mean_initializer",
    "moving_variance_initializer",
]
# One value for each argument, to see that it gets where it is checked; tests/core/test_options.py has the others.
BAD: list[tuple[str, Any, type[Exception]]] = [
    ("axis", 1.0, TypeError),
    ("momentum", 1.01, ValueError),
    ("epsilon", -1e-3, ValueError),
    ("center", "True", TypeError),
    ("scale", "True", TypeError),
    *((name, "no such thing", ValueError) for name in FUNCTIONS),
    ("renorm", "True", TypeError),
    ("renorm_clipping", {"max": 3}, ValueError),
    ("renorm_momentum", -0.01, ValueError),
    ("fused", "True", TypeError),
    ("trainable", "yes", TypeError),
    ("virtual_batch_size", 0, ValueError),
    ("adjustment", 1.0, TypeError),
    ("name", 3, TypeError),
    ("synchronized", "True", TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=lambda part: str(part)[:24])
def test_bad_options_are_refused_by_class_and_function(name: str, value: Any, error: type[Exception]) -> None:
    with tf.Graph().as_default():
        for make in (BatchNormalization, lambda **options: batch_normalization(tf.zeros([2, 3]), **options)):
            with pytest.raises(error, match=name) as caught:
                make(**{name: value})
            assert str(value) in str(caught.value)
        assert v1.global_variables() == []


def test_every_argument_that_can_be_bad_has_a_bad_value_in_the_table() -> None:
    known = {name for name, _, _ in BAD}
    assert set(inspect.signature(BatchNormalization).parameters) - {"kwargs"} == known
    assert set(inspect.signature(batch_normalization).parameters) - {"inputs", "training", "reuse"} == known


@pytest.mark.parametrize(("value", "error"), [(3.0, TypeError), ("no such thing", ValueError), ([1], TypeError)])
def test_functions_by_a_bad_name_or_type_are_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="gamma_constraint"):
        BatchNormalization(gamma_constraint=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "no such type"}, "dtype must be .*'no such type'"),
        ({"dtype": 3.5}, "dtype must be .*3.5"),
        ({"dtype": tf.int32}, "dtype must be of a floating-point type; received int32"),
        ({"dtype": "complex64"}, "dtype must be of a floating-point type; received complex64"),
        ({"momentun": 0.9}, "momentun"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_base_class_are_refused(options: dict[str, Any], message: str) -> None:
    before = Layer().name
    with pytest.raises(TypeError, match=message):
        BatchNormalization(**options)
    number = int(before.rpartition("_")[2])
    assert Layer().name == f"layer_{number + 1}"


UNFIT: list[tuple[dict[str, Any], list[int | None] | None, str, type[Exception], str]] = [
    ({}, [4, 3], "int32", TypeError, "inputs.*int32"),
    ({}, [4, 3], "bool", TypeError, "inputs.*bool"),
    ({}, None, "float32", ValueError, "inputs.*rank"),
    ({}, [4, None], "float32", ValueError, r"inputs.*known size.*\(4, None\)"),
    ({"axis": 2}, [4, 3], "float32", ValueError, "axis.*axis=2"),
    ({"axis": -3}, [4, 3], "float32", ValueError, "axis.*axis=-3"),
    ({"axis": [1, -1]}, [4, 3], "float32", ValueError, "axis.*once"),
    ({"axis": [0, 1], "virtual_batch_size": 2}, [4, 3], "float32", ValueError, "axis.*virtual_batch_size=2"),
    ({"virtual_batch_size": 3}, [4, 3], "float32", ValueError, "4 samples and virtual_batch_size=3"),
]


@pytest.mark.parametrize(("options", "shape", "dtype", "error", "message"), UNFIT, ids=lambda part: str(part)[:40])
def test_inputs_that_do_not_fit_make_no_variable(
    options: dict[str, Any], shape: list[int | None] | None, dtype: str, error: type[Exception], message: str
) -> None:
    with tf.Graph().as_default():
        layer = BatchNormalization(**options)
        with pytest.raises(error, match=message):
            layer(v1.placeholder(dtype, shape), training=True)
        assert not layer.built
        assert v1.global_variables() == []


@pytest.mark.parametrize("training", ["yes", [True], np.array([True, False]), 0.5, {}], ids=str)
def test_training_must_be_one_truth_value(training: Any) -> None:
    layer = BatchNormalization()
    with pytest.raises(TypeError, match="training"):
        layer(tf.zeros([2, 3]), training=training)
    assert not layer.built


@pytest.mark.parametrize(("dtype", "shape"), [("bool", [2]), ("float32", [])])
def test_a_tensor_that_says_training_must_be_a_boolean_scalar(dtype: str, shape: list[int]) -> None:
    with tf.Graph().as_default():
        layer = BatchNormalization()
        with pytest.raises(ValueError, match="training must be"):
            layer(tf.zeros([2, 3]), training=v1.placeholder(dtype, shape))
        assert v1.global_variables() == []


@pytest.mark.parametrize("training", [True, 1, np.True_, np.int64(1), tf.constant(True), tf.constant(1)], ids=str)
def test_training_may_be_any_scalar_truth_value(training: Any) -> None:
    layer = BatchNormalization(momentum=0.0)
    layer(tf.fill([2, 3], 5.0), training=training)
    np.testing.assert_allclose(layer.moving_mean, [5.0] * 3)
    variable = BatchNormalization(momentum=0.0)
    variable(tf.fill([2, 3], 5.0), training=tf.Variable(True))
    np.testing.assert_allclose(variable.moving_mean, [5.0] * 3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [[4, 2], [4, 3, 3], [3]], ids=str)
def test_a_built_layer_refuses_other_shapes_and_moves_nothing(shape: list[int], training: bool) -> None:
    layer = BatchNormalization()
    layer(tf.ones([4, 3]), training=True)
    before = layer.get_weights()
    with pytest.raises(ValueError, match=r"inputs must have (rank 2|size 3)"):
        layer(tf.ones(shape), training=training)
    np.testing.assert_equal(layer.get_weights(), before)


def test_a_built_layer_refuses_unknown_rank() -> None:
    with tf.Graph().as_default():
        layer = BatchNormalization()
        layer.build([None, 3])
        with pytest.raises(ValueError, match="rank 2"):
            layer(v1.placeholder(tf.float32, None))


@pytest.mark.parametrize("batch", [4, 5])
def test_a_batch_that_does_not_divide_names_both_numbers_and_moves_nothing(batch: int) -> None:
    layer = BatchNormalization(virtual_batch_size=3)
    layer(tf.ones([6, 2]), training=True)
    before = layer.get_weights()
    with pytest.raises(ValueError, match=f"{batch} samples and virtual_batch_size=3"):
        layer(tf.ones([batch, 2]), training=True)
    train = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 2])])
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=rf"batch of \W*{batch}\W* samples and virtual_batch_size=3"
    ):
        train(tf.ones([batch, 2]))
    np.testing.assert_equal(layer.get_weights(), before)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((1.0,), "pair"),
        ((np.ones(5, np.float32), 0.0), r"shape \(4, 3\).*\(5,\)"),
    ],
    ids=str,
)
def test_an_adjustment_must_return_a_pair_that_broadcasts(returned: Any, message: str) -> None:
    layer = BatchNormalization(adjustment=lambda shape: returned)
    layer.build([None, 3])
    before = layer.get_weights()
    with pytest.raises(ValueError, match=f"adjustment.*{message}"):
        layer(tf.ones([4, 3]), training=True)
    np.testing.assert_equal(layer.get_weights(), before)


def test_weights_are_set_all_or_none() -> None:
    layer = BatchNormalization()
    with pytest.raises(ValueError, match="count_params"):
        layer.count_params()
    layer.build([None, 3])
    before = layer.get_weights()
    with pytest.raises(ValueError, match=r"4 arrays.*received 1"):
        layer.set_weights([np.ones(3)])
    with pytest.raises(ValueError, match=r"moving_variance.*\(4,\)"):
        layer.set_weights([np.ones(3), np.ones(3), np.ones(3), np.ones(4)])
    np.testing.assert_equal(layer.get_weights(), before)


def test_sessions_are_asked_for_by_name() -> None:
    with tf.Graph().as_default():
        layer = BatchNormalization()
        layer.build([None, 3])
        for method, arguments in (("get_weights", ()), ("set_weights", ([np.ones(3)] * 4,))):
            with pytest.raises(RuntimeError, match=f"{method}.*session"):
                getattr(layer, method)(*arguments)


def test_weights_of_a_layer_are_checked_by_name() -> None:
    layer = Layer()
    with pytest.raises(TypeError, match="collection"):
        layer.add_weight("w", [2], collection=[])
    with pytest.raises(ValueError, match="ON_READ"):
        layer.add_weight("w", [2], trainable=True, synchronization=tf.VariableSynchronization.ON_READ)
