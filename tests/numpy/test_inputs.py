"""What may be normalized: types, shapes and memory of inputs, and the adjustment of a batch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from batchnorm.numpy import BatchNormalization


@pytest.mark.parametrize(
    "x", [[[1, 2]], np.ones((2, 2), np.int64), np.ones((2, 2), bool), np.ones((2, 2), complex), [["a"]]]
)
@pytest.mark.parametrize("training", [False, True])
def test_inputs_that_are_not_floating_point_numbers_are_refused_and_leave_the_layer_unbuilt(
    x: Any, training: bool
) -> None:
    layer = BatchNormalization()
    with pytest.raises(TypeError, match=f"inputs must be of a floating-point type.*{np.asarray(x).dtype.name}"):
        layer(x, training=training)
    assert layer.variables == {}
    assert layer(np.ones((3, 4, 5))).shape == (3, 4, 5)


BAD_INPUTS: list[tuple[dict[str, Any], tuple[int, ...], str]] = [
    ({}, (), "axis"),
    ({"axis": 2}, (4, 3), "axis=2"),
    ({"axis": (1, -1)}, (4, 3), "axis"),
    ({"axis": 0, "virtual_batch_size": 2}, (4, 3), "virtual_batch_size=2"),
    ({"gamma_initializer": np.ones(4)}, (4, 3), r"gamma_initializer must .*broadcasts to shape \(3,\).*\(4,\)"),
    (
        {"renorm": True, "moving_mean_initializer": lambda shape, dtype: np.ones(4)},
        (4, 3),
        r"^moving_mean_initializer must .*broadcasts to shape \(3,\).*\(4,\)",
    ),
    ({"adjustment": lambda shape: (np.ones((5, 4, 3)), 0.0)}, (4, 3), "adjustment"),
    ({"adjustment": lambda shape: 1.0}, (4, 3), "adjustment"),
]


@pytest.mark.parametrize(("options", "shape", "message"), BAD_INPUTS, ids=lambda part: str(part)[:24])
def test_a_first_input_that_does_not_fit_the_options_leaves_the_layer_unbuilt(
    options: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    layer = BatchNormalization(**options)
    with pytest.raises(ValueError, match=message):
        layer(np.ones(shape), training=True)
    assert layer.variables == {}


@pytest.mark.parametrize("argument", ["training", "update"])
@pytest.mark.parametrize("value", ["no", None, np.array([True, False])], ids=str)
def test_a_mode_that_is_no_bool_is_refused_by_name_and_leaves_the_layer_unbuilt(argument: str, value: Any) -> None:
    layer = BatchNormalization()
    with pytest.raises(TypeError, match=f"^{argument} must be True or False; received {re.escape(repr(value))}"):
        layer(np.ones((4, 3)), **{argument: value})
    assert layer.variables == {}


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 3), (3,), ()])
@pytest.mark.parametrize("training", [False, True])
def test_a_later_input_of_another_rank_or_feature_size_is_refused_and_moves_nothing(
    shape: tuple[int, ...], training: bool
) -> None:
    layer = BatchNormalization()
    layer(np.random.default_rng(0).normal(size=(5, 3)), training=True)
    before = {name: value.tolist() for name, value in layer.variables.items()}
    with pytest.raises(ValueError, match="inputs must have"):
        layer(np.ones(shape), training=training)
    assert {name: value.tolist() for name, value in layer.variables.items()} == before


@pytest.mark.parametrize("axis", [-1, 1])
def test_any_memory_layout_gives_the_same(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5, 4, 7)).astype(np.float32)
    expected = BatchNormalization(axis=axis)(x, training=True)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    read_only = x.copy()
    read_only.flags.writeable = False
    strided = np.repeat(x, 2, axis=2)[:, :, ::2]
    for other in (unaligned, read_only, strided, np.asfortranarray(x), x.astype(">f4")):
        y = BatchNormalization(axis=axis)(other, training=True)
        np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("returned", "message"),
    [((1.0,), "must be or return a pair"), ((1.0, np.ones((4, 2))), r"broadcast.*\(3, 2\).*\(4, 2\)")],
)
def test_an_adjustment_that_returns_no_pair_or_does_not_broadcast_is_refused_and_moves_nothing(
    returned: Any, message: str
) -> None:
    layer = BatchNormalization(adjustment=lambda _: returned)
    layer.build((None, 2))
    with pytest.raises(ValueError, match=f"^adjustment.*{message}"):
        layer(np.arange(6.0).reshape(3, 2), training=True)
    assert layer.moving_mean.tolist() == [0.0, 0.0]


def test_an_adjustment_is_called_with_the_shape_once_per_training_step_and_never_in_inference() -> None:
    calls: list[tuple[int, ...]] = []

    def adjustment(shape: tuple[int, ...]) -> tuple[float, float]:
        calls.append(shape)
        return 2.0, 1.0

    layer = BatchNormalization(adjustment=adjustment)
    layer(np.ones((4, 3)))
    assert calls == []
    y = layer(np.ones((5, 3)), training=True)
    assert calls == [(5, 3)]
    assert y.tolist() == np.ones((5, 3)).tolist()


def test_an_adjustment_that_repeats_one_number_is_taken() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3))
    layer = BatchNormalization(
        scale=False, adjustment=lambda shape: (np.broadcast_to(1.5, (3,)), np.broadcast_to(0.5, (3,)))
    )
    plain = BatchNormalization(scale=False)
    np.testing.assert_allclose(layer(x, training=True), 1.5 * plain(x, training=True) + 0.5)
    assert layer.kernel == plain.kernel
