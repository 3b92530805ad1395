"""Every option and pair of options against the NumPy reference: steps, averages, gradients, inference."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.core.passes import COMPOSED
from batchnorm.cpu import KERNEL
from batchnorm.keras import BatchNormalization, ClippingSchedule

from .support import BACKEND, DIFFERENTIATES, Array, array, averages, numpy_of, step

SHAPE = (12, 4, 3, 5)
LIMITED = {"renorm": True, "renorm_clipping": {"rmin": 0.7, "rmax": 1.5, "dmax": 0.4}, "renorm_momentum": 0.8}
SINGLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "features first": {"axis": 1},
    "two axes side by side": {"axis": [1, 2]},
    "two axes apart": {"axis": [1, -1]},
    "first axis": {"axis": 0},
    "renorm": {"renorm": True, "renorm_momentum": 0.8},
    "limited renorm": LIMITED,
    "virtual batches": {"virtual_batch_size": 4},
    "uneven virtual batches": {"virtual_batch_size": 5},
    "one larger than the batch": {"virtual_batch_size": 100},
    "no scale": {"scale": False},
    "no offset": {"center": False},
    "neither": {"scale": False, "center": False},
    "skip": {"skip_nonfinite": True},
    "adjustment by feature": {"adjustment": "feature"},
    "adjustment by sample": {"adjustment": "sample"},
}
PAIRED = (
    *("two axes apart", "limited renorm", "uneven virtual batches", "neither", "skip"),
    *("adjustment by feature", "adjustment by sample"),
)


def compatible(one: str, other: str) -> bool:
    together = {*SINGLE[one], *SINGLE[other]}
    return len(together) == len(SINGLE[one]) + len(SINGLE[other]) and not together >= {
        "virtual_batch_size",
        "adjustment",
    }


CASES = SINGLE | {
    f"{one} and {other}": SINGLE[one] | SINGLE[other]
    for one, other in itertools.combinations(PAIRED, 2)
    if compatible(one, other)
}


def adjustment_of(kind: str, axis: Any, rng: np.random.Generator) -> Any:
    axes = {each % len(SHAPE) for each in (axis if isinstance(axis, list) else [axis])}
    size = [n if (at in axes if kind == "feature" else at == 0) else 1 for at, n in enumerate(SHAPE)]
    pair = rng.uniform(0.5, 1.5, size).astype("float32"), rng.uniform(-0.5, 0.5, size).astype("float32")
    return lambda shape: pair


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("fused", [None, False], ids=["fastest", "composed"])
def test_options_and_pairs_of_them_give_what_the_reference_gives(fused: bool | None, masked: bool) -> None:
    served = set()
    for name, options in (SINGLE if masked else CASES).items():
        rng = np.random.default_rng(0)
        asked = dict(options)
        if "adjustment" in asked:
            asked["adjustment"] = adjustment_of(asked["adjustment"], asked.get("axis", -1), rng)
        layer = BatchNormalization(momentum=0.9, fused=fused, **asked)
        layer.build(SHAPE)
        reference = numpy_of(layer, adjustment=asked.get("adjustment"))
        reference.build(SHAPE, np.float64)
        for variable in layer.trainable_variables:
            variable.assign(rng.normal(1, 0.3, variable.shape))
            reference.variables[variable.name] = (
                array(variable.value).astype(np.float64).reshape(reference.variables[variable.name].shape)
            )
        for at in range(3):
            x = (rng.normal(3, 2, SHAPE) + at).astype("float32")
            dy = rng.normal(size=SHAPE).astype("float32")
            mask = None
            if masked:
                axes = {each % 4 for each in np.atleast_1d(asked.get("axis", -1))}
                weights = rng.uniform(size=[1 if axis in axes else size for axis, size in enumerate(SHAPE)])
                mask = np.where(weights > 0.3, weights if at else 1.0, 0).astype("float32")
            y, gradient = reference.vjp(x.astype(np.float64), training=True, mask=mask)
            found = step(layer, x, dy, mask=None if mask is None else ops.convert_to_tensor(mask))
            np.testing.assert_allclose(found.y, y, rtol=1e-4, atol=2e-5, err_msg=name)
            if DIFFERENTIATES:
                expected = gradient(dy.astype(np.float64))
                np.testing.assert_allclose(found.dx, expected.inputs, rtol=1e-3, atol=1e-4, err_msg=name)
                for weight, value in found.weights.items():
                    right = np.asarray(getattr(expected, weight)).reshape(value.shape)
                    np.testing.assert_allclose(value, right, rtol=1e-3, atol=2e-4, err_msg=f"{name}, {weight}")
            for average, value in averages(layer).items():
                expected_average = reference.variables[average].reshape(-1)
                np.testing.assert_allclose(value, expected_average, rtol=1e-4, atol=1e-5, err_msg=f"{name}, {average}")
        served.add(layer.kernel)
        x = rng.normal(3, 2, SHAPE).astype("float32")
        np.testing.assert_allclose(array(layer(x)), reference(x.astype(np.float64)), rtol=1e-4, atol=2e-5, err_msg=name)
    assert COMPOSED in served  # an adjustment by sample, if nothing else
    assert (KERNEL in served) == (fused is None and BACKEND != "numpy")


@pytest.mark.parametrize(
    "options", [{}, {"renorm": True}, {"virtual_batch_size": 5}, {"axis": [1, 3]}, {"fused": False}]
)
def test_skip_nonfinite_keeps_the_averages_of_the_features_that_are_not_finite(options: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    x[3, 1, 2, 4], x[0, 0, 0, 0] = np.inf, np.nan
    for skip in (True, False):
        layer = BatchNormalization(skip_nonfinite=skip, **options)
        reference = numpy_of(layer)
        with np.errstate(invalid="ignore"):
            layer(x, training=True)
            reference(x.astype(np.float64), training=True)
        for name, value in averages(layer).items():
            right = reference.variables[name].reshape(-1)
            lost = ~np.isfinite(right)
            np.testing.assert_array_equal(~np.isfinite(value), lost)
            np.testing.assert_allclose(value[~lost], right[~lost], rtol=1e-4, atol=1e-5)
            assert bool(np.isfinite(value).all()) == skip


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 5}])
def test_update_false_normalizes_by_the_batch_and_moves_nothing(options: dict[str, Any]) -> None:
    x = np.random.default_rng(0).normal(3, 2, SHAPE).astype("float32")
    layer, other = BatchNormalization(**options), BatchNormalization(**options)
    layer.build(SHAPE)
    before = averages(layer)
    y = layer(x, training=True, update=False)
    for name, value in averages(layer).items():
        np.testing.assert_array_equal(value, before[name])
    np.testing.assert_array_equal(array(y), array(other(x, training=True)))
    assert not np.array_equal(averages(other)["moving_mean"], before["moving_mean"])


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 4}, {"axis": [1, 3]}])
def test_a_mean_that_is_large_beside_the_spread_costs_nothing(options: dict[str, Any], fused: bool | None) -> None:
    x = np.random.default_rng(0).normal(1e4, 1, SHAPE).astype("float32")
    layer = BatchNormalization(fused=fused, moving_mean_initializer=keras.initializers.Constant(1e4), **options)
    reference = numpy_of(layer, moving_mean_initializer=1e4)
    np.testing.assert_allclose(
        array(layer(x, training=True)), reference(x.astype(np.float64), training=True), atol=1e-5
    )
    np.testing.assert_allclose(array(layer(x)), reference(x.astype(np.float64)), atol=2e-3)


@pytest.mark.skipif(BACKEND in ("jax", "numpy"), reason="there Keras' own operations make float32 of float64")
@pytest.mark.parametrize("fused", [None, False])
def test_float64_is_computed_in_float64(fused: bool | None) -> None:
    x = np.random.default_rng(0).normal(3, 2, SHAPE)
    layer = BatchNormalization(fused=fused, dtype="float64")
    reference = numpy_of(layer)
    reference.build(SHAPE, np.float64)
    for training in (True, False):
        np.testing.assert_allclose(array(layer(x, training=training)), reference(x, training=training), atol=1e-12)


def empty(masked: bool) -> tuple[Array, Any]:
    x = np.ones((3, 2, 4) if masked else (0, 2, 4), "float32")
    return x, np.zeros((3, 2), bool) if masked else None


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}, {"axis": [1, 2]}])
@pytest.mark.parametrize("masked", [False, True], ids=["empty", "masked"])
def test_of_no_values_nothing_moves(masked: bool, options: dict[str, Any], fused: bool | None) -> None:
    x, mask = empty(masked)
    if masked and "axis" in options:
        mask = np.zeros((3, 1, 1), bool)
    layer = BatchNormalization(fused=fused, **options)
    layer.build((None, 2, 4))
    before = averages(layer)
    y = array(layer(x, training=True, mask=None if mask is None else ops.convert_to_tensor(mask)))
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    for name, value in averages(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_nothing_under_the_mask_reaches_the_rest() -> None:
    x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype("float32")
    mask = np.random.default_rng(1).uniform(size=(6, 4)) > 0.4
    other = np.where(mask[..., None], x, np.nan).astype("float32")
    one, two = BatchNormalization(), BatchNormalization()
    dy = np.where(mask[..., None], 1.5, 0).astype("float32") * x
    found, same = (step(layer, x, dy, mask=ops.convert_to_tensor(mask)) for layer, x in ((one, x), (two, other)))
    np.testing.assert_array_equal(found.y[mask], same.y[mask])
    np.testing.assert_array_equal(averages(one)["moving_variance"], averages(two)["moving_variance"])
    if DIFFERENTIATES:
        np.testing.assert_array_equal(found.dx[mask], same.dx[mask])
        np.testing.assert_allclose(found.weights["gamma"], same.weights["gamma"])


def test_a_mask_that_fits_both_rules_means_what_it_means_to_keras() -> None:
    x = np.random.default_rng(0).normal(size=(6, 4, 4)).astype("float32")
    mask = np.random.default_rng(1).uniform(size=(6, 4)) > 0.4
    for axis in (1, 2):
        ours, theirs = BatchNormalization(axis=axis), keras.layers.BatchNormalization(axis=axis)
        if (
            axis == 1
        ):  # where theirs takes it, but not for the output's shape: compare the averages that it would move to
            counted = np.broadcast_to(mask[..., None], x.shape)
            mean = np.sum(x * counted, (0, 2)) / counted.sum((0, 2))
            ours(x, training=True, mask=ops.convert_to_tensor(mask))
            np.testing.assert_allclose(averages(ours)["moving_mean"], 0.01 * mean, rtol=1e-4, atol=1e-6)
        else:
            for layer in (ours, theirs):
                layer(x, training=True, mask=ops.convert_to_tensor(mask))
            np.testing.assert_allclose(averages(ours)["moving_mean"], averages(theirs)["moving_mean"], rtol=1e-4)
    positions = np.random.default_rng(2).uniform(size=(6, 5)) > 0.4  # of x without the feature axis 1, which has size 4
    x = np.random.default_rng(0).normal(size=(6, 4, 5)).astype("float32")
    ours = BatchNormalization(axis=1)
    ours(x, training=True, mask=ops.convert_to_tensor(positions))
    mean = np.array([x[:, feature][positions].mean() for feature in range(4)])
    np.testing.assert_allclose(averages(ours)["moving_mean"], 0.01 * mean, rtol=1e-4, atol=1e-6)


def test_limits_may_be_tensors_and_schedules_count_the_steps_that_move() -> None:
    x = np.random.default_rng(0).normal(3, 2, SHAPE).astype("float32")
    numbers = BatchNormalization(renorm=True, renorm_clipping={"rmin": 0.5, "rmax": 1.5, "dmax": 0.25})
    limits = {"rmin": 0.5, "rmax": 1.5, "dmax": ops.convert_to_tensor(0.25)}
    tensors = BatchNormalization(renorm=True, renorm_clipping=limits)
    np.testing.assert_allclose(array(numbers(x, training=True)), array(tensors(x, training=True)), atol=1e-6)
    schedule = ClippingSchedule(2, rmax=3.0, rmax_end=6, dmax=5.0, dmax_end=4)
    layer = BatchNormalization(renorm=True, renorm_clipping=schedule, momentum=0.9, renorm_momentum=0.8)
    reference = numpy_of(layer)
    for at in range(8):
        reference.options = type(reference.options)(
            **{**vars(reference.options), "renorm_clipping": type(reference.options.renorm_clipping)(**schedule(at))}
        )
        y = layer(x + at, training=True)
        layer(x + at, training=True, update=False)
        np.testing.assert_allclose(array(y), reference(x.astype(np.float64) + at, training=True), rtol=1e-4, atol=2e-5)
    assert int(array(layer.steps.value)) == 8
    if BACKEND != "jax":
        variable = keras.Variable(0.0)
        moving = BatchNormalization(renorm=True, renorm_clipping={"dmax": variable})
        first = array(moving(x, training=True, update=False))
        variable.assign(10.0)
        assert not np.allclose(first, array(moving(x, training=True, update=False)))
        assert len(moving.weights) == 7
