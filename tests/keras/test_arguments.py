"""Bad input: which error, in whose words; and nothing is built or moved before."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.keras import BatchNormalization

from .support import BACKEND, array

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"axis": 1.5}, TypeError, "axis must be an int or a list or tuple of distinct ints; received 1.5 of type float"),
    ({"axis": []}, ValueError, "axis must be .*, at least one"),
    ({"axis": [1, 1]}, ValueError, "axis must be"),
    ({"axis": "last"}, TypeError, "axis must be"),
    ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\]; received 1.5"),
    ({"momentum": "fast"}, TypeError, "momentum must be"),
    ({"momentum": None}, TypeError, "momentum must be"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be finite and at least 0"),
    ({"epsilon": math.nan}, ValueError, "epsilon must be"),
    ({"center": "yes"}, TypeError, "center must be True or False"),
    ({"scale": 2}, TypeError, "scale must be True or False"),
    ({"renorm": "yes"}, TypeError, "renorm must be True or False"),
    ({"renorm_momentum": 2}, ValueError, "renorm_momentum must be in"),
    (
        {"renorm": True, "renorm_clipping": {"max": 1}},
        ValueError,
        "Received invalid keys for `renorm_clipping` argument",
    ),
    ({"renorm": True, "renorm_clipping": {"rmax": 1.0, "rmin": 2.0}}, ValueError, "rmax should be greater than rmin"),
    ({"renorm": True, "renorm_clipping": {"dmax": -1.0}}, ValueError, "dmax should be non-negative"),
    ({"renorm": True, "renorm_clipping": {"dmax": "1"}}, TypeError, "dmax"),
    ({"renorm": True, "renorm_clipping": 3}, TypeError, "renorm_clipping must be"),
    ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be None or at least 1; received 0"),
    ({"virtual_batch_size": 2.5}, TypeError, "virtual_batch_size must be"),
    ({"adjustment": 3}, TypeError, "adjustment must be None or a function"),
    ({"adjustment": len, "virtual_batch_size": 2}, ValueError, "cannot be used together"),
    ({"fused": "yes"}, TypeError, "fused must be"),
    ({"skip_nonfinite": "yes"}, TypeError, "skip_nonfinite must be"),
    ({"synchronized": "yes"}, TypeError, "synchronized must be"),
    ({"gamma_initializer": "no such thing"}, ValueError, "no such thing"),
    ({"units": 3}, ValueError, "Unrecognized keyword arguments"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(each[0]) for each in WRONG])
def test_a_wrong_option_is_an_error_that_says_what_came(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BatchNormalization(**options)


def test_statistics_of_replicas_and_virtual_batches_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"synchronized.*virtual_batch_size=4"):
        BatchNormalization(synchronized=True, virtual_batch_size=4)


def test_without_replicas_synchronized_means_nothing() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (8, 5, 3)).astype(np.float32)
    plain, layer = BatchNormalization(renorm=True), BatchNormalization(renorm=True, synchronized=True)
    first, second = (keras.ops.convert_to_numpy(each(x, training=True)) for each in (plain, layer))
    np.testing.assert_array_equal(first, second)
    assert layer.kernel == plain.kernel
    assert BatchNormalization.from_config(layer.get_config()).synchronized is True


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"axis": 3}, (2, 3, 4), "Axis 3 is out of bounds for input shape"),
        ({"axis": [0, -4]}, (2, 3, 4), "Axis -4 is out of bounds for input shape"),
        ({"axis": [-1, 2]}, (2, 3, 4), "axis must name each axis once"),
        ({}, (2, None), "known size on every feature axis"),
        ({"axis": 0, "virtual_batch_size": 2}, (4, 3), "axis cannot include the batch axis 0"),
    ],
)
def test_options_that_do_not_fit_the_shape_are_found_before_anything_is_made(
    options: dict[str, Any], shape: Any, message: str
) -> None:
    layer = BatchNormalization(**options)
    with pytest.raises(ValueError, match=message):
        layer.build(shape)
    assert layer.weights == []
    if None not in shape:
        with pytest.raises(ValueError, match=message):
            layer(np.ones(shape, "float32"))
        assert layer.weights == []


X = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("float32")


@pytest.mark.parametrize(
    ("options", "x", "call", "message"),
    [
        ({}, X[..., :2], {}, "expected axis 2 of input shape to have value 3"),
        ({}, X[0], {}, "expected ndim=3"),
        ({}, X, {"mask": np.ones((6,), bool)}, "The mask provided should be one dimension less than the inputs"),
        ({}, X, {"mask": np.ones((6, 3), bool)}, "mask must have shape"),
        ({}, X, {"mask": np.ones((6, 4, 3), bool)}, "mask must have shape"),
        ({"axis": [1, 2]}, X, {"mask": np.ones((5,), bool)}, "mask must have shape"),
        ({"adjustment": lambda shape: 3}, X, {}, r"adjustment must be or return a pair \(scale, bias\)"),
        (
            {"adjustment": lambda shape: (np.ones(2), np.ones(2))},
            X,
            {},
            "adjustment must be or return arrays that broadcast",
        ),
        ({"renorm": True, "renorm_clipping": lambda steps: {"max": 1}}, X, {}, "Received invalid keys"),
    ],
)
def test_a_wrong_call_is_an_error_before_anything_moves(
    options: dict[str, Any], x: Any, call: dict[str, Any], message: str
) -> None:
    layer = BatchNormalization(**options)
    layer.build(X.shape)
    before = layer.get_weights()
    given = {name: ops.convert_to_tensor(value) for name, value in call.items()}
    with pytest.raises(ValueError, match=message):
        layer(x, training=True, **given)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


@pytest.mark.skipif(BACKEND == "jax", reason="a program of JAX does not know values")
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_weights_that_are_no_weights_are_refused_where_they_can_be_looked_at(value: float) -> None:
    layer = BatchNormalization()
    with pytest.raises(ValueError, match="mask must hold finite numbers that are not negative"):
        layer(X, training=True, mask=ops.convert_to_tensor(np.full((6, 4), value, "float32")))


def test_a_mask_of_complex_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="mask must hold booleans or real numbers; received dtype complex64"):
        BatchNormalization()(X, training=True, mask=ops.convert_to_tensor(np.ones((6, 4), "complex64")))


def test_update_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="update must be True or False"):
        BatchNormalization()(X, training=True, update="no")


def test_options_that_are_set_are_checked_and_hold() -> None:
    layer, other = BatchNormalization(), BatchNormalization(momentum=0.5, epsilon=0.1, virtual_batch_size=4)
    layer.momentum, layer.epsilon, layer.virtual_batch_size = 0.5, 0.1, 4
    np.testing.assert_array_equal(array(layer(X, training=True)), array(other(X, training=True)))
    np.testing.assert_array_equal(layer.get_weights()[2], other.get_weights()[2])
    assert layer.get_config()["momentum"] == 0.5
    for name, wrong in (("momentum", 2), ("epsilon", -1), ("virtual_batch_size", 0), ("fused", 3), ("adjustment", 3)):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(layer, name, wrong)
    for name in ("axis", "center", "scale", "renorm"):
        with pytest.raises(AttributeError):
            setattr(layer, name, 0)
    renorm = BatchNormalization(renorm=True)
    renorm.build(X.shape)
    renorm.renorm_clipping = {"rmax": 2.0}
    assert renorm.renorm_clipping == {"rmax": 2.0}
    with pytest.raises(ValueError, match="renorm_clipping must be a function from the beginning"):
        renorm.renorm_clipping = lambda steps: {}


@pytest.mark.skipif(BACKEND != "jax", reason="where a compiled step reads variables when it runs")
def test_variables_as_limits_are_refused_on_jax() -> None:
    with pytest.raises(ValueError, match="must not hold variables on JAX"):
        BatchNormalization(renorm=True, renorm_clipping={"dmax": keras.Variable(1.0)})
