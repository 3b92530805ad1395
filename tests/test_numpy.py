"""The layer on NumPy arrays, against the oracle of loops."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.numpy import BatchNormalization, Gradients
from tests.oracle import Oracle, Pair, differences

Array = npt.NDArray[Any]

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
ROUNDING = {"float64": 1e-11, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
"""What a comparison allows, relative to the largest value: what is stored in the type, and a few steps of it."""
NAMES = ("gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


class Adjust:
    """An adjustment of a drawn form: each of scale and bias keeps some of the input's axes and drops leading ones."""

    def __init__(self, seed: int, forms: tuple[tuple[tuple[bool, ...], int], ...]) -> None:
        self.seed = seed
        self.forms = forms
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        self.shapes.append(shape)
        rng = np.random.default_rng(self.seed)
        sizes = [
            tuple(size if keep else 1 for size, keep in zip(shape, kept, strict=True))[drop:]
            for kept, drop in self.forms
        ]
        return rng.uniform(0.5, 1.5, sizes[0]), rng.uniform(-0.5, 0.5, sizes[1])

    def __repr__(self) -> str:
        return f"Adjust({self.seed}, {self.forms})"


@dataclasses.dataclass
class Case:
    """A layer, the shapes of its batches, and where it starts."""

    shapes: list[tuple[int, ...]]
    options: dict[str, Any]
    center: bool
    scale: bool
    clipping: dict[str, Any] | None
    dtype: str
    seed: int
    mean: float
    spread: float
    fused: bool | None

    @property
    def kept(self) -> str:
        """The type of the variables."""
        return "float64" if self.dtype == "float64" else "float32"

    def x(self, shape: tuple[int, ...], seed: int) -> Array:
        rng = np.random.default_rng([self.seed, seed])
        return (self.mean + self.spread * rng.normal(size=shape)).astype(DTYPES[self.dtype])

    def initial(self) -> dict[str, Array]:
        oracle = Oracle.build(self.shapes[0], **self._oracle_options())
        rng = np.random.default_rng(self.seed)
        initial = {
            "gamma": rng.uniform(-2, 2, oracle.sizes),
            "beta": rng.uniform(-2, 2, oracle.sizes),
            "moving_mean": rng.uniform(-1, 1, oracle.sizes),
            "moving_variance": rng.uniform(0.0, 2.0, oracle.sizes),
        }
        return {name: value.astype(self.kept).astype(np.float64) for name, value in initial.items()}

    def oracle(self) -> Oracle:
        return Oracle.build(self.shapes[0], **self._oracle_options(), initial=self.initial())

    def layer(self) -> BatchNormalization:
        shape = self.oracle().parameter_shape(len(self.shapes[0]))
        initializers: dict[str, Any] = {
            f"{name}_initializer": value.reshape(shape) for name, value in self.initial().items()
        }
        return BatchNormalization(
            center=self.center,
            scale=self.scale,
            renorm_clipping=self.clipping,
            fused=self.fused,
            **initializers,
            **self.options,
        )

    def _oracle_options(self) -> dict[str, Any]:
        limits = {key: value for key, value in (self.clipping or {}).items() if value is not None}
        return {**self.options, **limits, "center": self.center, "scale": self.scale}


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    sizes: tuple[int, ...] = (0, 1, 2, 3, 5, 7),
    most: int = 300,
    steps: int = 6,
    dtypes: tuple[str, ...] = tuple(DTYPES),
) -> Case:
    """Any legal combination of options, and the shapes of `steps` batches."""
    rank = draw(st.integers(2, 5))
    size = draw(st.sampled_from([None, None, 1, 2, 3]))
    first = 0 if size is None else 1
    axes = draw(st.lists(st.integers(first, rank - 1), min_size=1, max_size=rank, unique=True))
    axis = tuple(each - rank * draw(st.booleans()) for each in axes)
    whole = [draw(st.sampled_from(sizes)) for _ in range(rank)]
    while math.prod(whole) > most:
        widest = max(whole)
        whole[whole.index(widest)] = 2 if widest > 2 else 1
    shapes = []
    for _ in range(steps):
        samples = whole[0]
        if size is not None:
            samples = size * draw(st.integers(min(sizes), 3))
        elif 0 not in axes:
            samples = draw(st.sampled_from(sorted({min(sizes), 1, samples})))
        shapes.append((samples, *whole[1:]))
    clipping = draw(
        st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {},
                optional={
                    "rmin": st.sampled_from([None, 0.0, 0.5, 0.99]),
                    "rmax": st.sampled_from([None, 1.01, 3.0, math.inf]),
                    "dmax": st.sampled_from([None, 0.0, 0.5, math.inf]),
                },
            ),
        )
    )
    form = st.tuples(st.tuples(*[st.booleans()] * rank), st.integers(0, rank))
    adjustment = None
    if size is None and draw(st.booleans()):
        adjustment = Adjust(draw(st.integers(0, 9)), (draw(form), draw(form)))
    options = {
        "axis": axis[0] if len(axis) == 1 and draw(st.booleans()) else axis,
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])),
        "epsilon": draw(st.sampled_from([1e-3, 1e-2, 0.5])),
        "renorm": draw(st.booleans()),
        "renorm_momentum": draw(st.sampled_from([0.0, 0.7, 0.99, 1.0])),
        "virtual_batch_size": size,
        "adjustment": adjustment,
    }
    return Case(
        shapes,
        options,
        draw(st.booleans()),
        draw(st.booleans()),
        clipping,
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from([0.0, -3.0, 3.0])),
        draw(st.sampled_from([0.0, 0.5, 2.0])),
        draw(st.sampled_from([None, False])),
    )


def near(actual: Array, expected: Array, dtype: str) -> None:
    wide = np.asarray(actual, np.float64)
    allowed = ROUNDING[dtype] * max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(wide, expected, rtol=0, atol=allowed)


def same_state(layer: BatchNormalization, oracle: Oracle, rank: int, dtype: str) -> None:
    assert list(layer.variables) == [name for name in NAMES if name in oracle.variables]
    for name, value in layer.variables.items():
        assert value.dtype == dtype
        near(value, oracle.variables[name].reshape(oracle.parameter_shape(rank)), dtype)


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


# Gradients


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


# Empty batches


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


# Virtual batches


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


# Inputs


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
    ({"gamma_initializer": np.ones(4)}, (4, 3), "broadcast"),
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


@pytest.mark.parametrize(
    ("returned", "message"),
    [((1.0,), "must return a pair"), ((1.0, np.ones((4, 2))), r"broadcast.*\(3, 2\).*\(4, 2\)")],
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


# Variables


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


@pytest.mark.parametrize("dtype", [np.int32, bool, complex, "S1", np.longdouble])
def test_a_type_that_is_not_floating_point_is_refused(dtype: Any) -> None:
    with pytest.raises(
        TypeError, match=f"dtype must be of a floating-point type of up to 64 bits; received {np.dtype(dtype).name}"
    ):
        BatchNormalization(dtype=dtype)


PARAMETERS = ("beta", "gamma", "moving_mean", "moving_variance")


@pytest.mark.parametrize("name", PARAMETERS)
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


@pytest.mark.parametrize(
    ("initializer", "error"),
    [("glorot", ValueError), (True, TypeError), (None, TypeError), ({"zeros": 1}, TypeError), ([1j], TypeError)],
)
def test_a_bad_initializer_is_refused_by_value(initializer: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^gamma_initializer") as caught:
        BatchNormalization(gamma_initializer=initializer)
    assert repr(initializer) in str(caught.value)


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


# Parameters and training


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


BAD: list[tuple[str, Any, type[Exception]]] = [
    ("axis", 1.5, TypeError),
    ("momentum", 2.0, ValueError),
    ("epsilon", -1.0, ValueError),
    ("center", "no", TypeError),
    ("scale", "no", TypeError),
    *((f"{name}_initializer", "glorot", ValueError) for name in PARAMETERS),
    *((f"{name}_{kind}", 1.0, TypeError) for name in ("gamma", "beta") for kind in ("regularizer", "constraint")),
    ("renorm", "no", TypeError),
    ("renorm_clipping", {"amax": 1}, ValueError),
    ("renorm_momentum", -1.0, ValueError),
    ("fused", "no", TypeError),
    ("trainable", "no", TypeError),
    ("virtual_batch_size", 0, ValueError),
    ("adjustment", 3, TypeError),
    ("dtype", np.int32, TypeError),
    ("skip_nonfinite", "no", TypeError),
    ("masked", "no", ValueError),
]


@pytest.mark.parametrize(("argument", "value", "error"), BAD, ids=lambda part: str(part)[:24])
def test_a_bad_argument_is_refused_under_its_own_name(argument: str, value: Any, error: type[Exception]) -> None:
    options: dict[str, Any] = {argument: value}
    with pytest.raises(error, match=f"^{argument}") as caught:
        BatchNormalization(**options)
    assert (np.dtype(value).name if argument == "dtype" else repr(value)) in str(caught.value)


def test_every_argument_that_can_be_bad_has_a_bad_value_in_the_table() -> None:
    arguments = set(inspect.signature(BatchNormalization).parameters)
    assert {argument for argument, _, _ in BAD} == arguments - {"name"}


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


@pytest.mark.parametrize("training", [False, True])
def test_fused_says_which_kernel_serves(training: bool) -> None:
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 3)).astype(np.float32)
    served: dict[bool | None, str | None] = {}
    for fused in (None, True, False):
        layer = BatchNormalization(fused=fused)
        assert layer.kernel is None
        layer(x, training=training)
        served[fused] = layer.kernel
    assert served == {None: "cpu", True: "cpu", False: "composed"}


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"axis": [1, 2]}, "cpu"),
        ({"axis": [1, 3]}, "cpu"),
        ({"axis": [1, 3], "renorm": True}, "cpu"),
        ({"axis": [1, 3], "virtual_batch_size": 2}, "composed"),
        ({"axis": 1, "renorm": True, "virtual_batch_size": 2}, "cpu"),
        ({"adjustment": lambda shape: (np.ones(3), 0.5)}, "cpu"),
        ({"adjustment": lambda shape: (np.ones((4, 1, 1, 1)), 0.5)}, "composed"),
    ],
    ids=[
        "side by side",
        "apart",
        "apart and renorm",
        "apart and virtual batches",
        "renorm and virtual batches",
        "by feature",
        "by sample",
    ],
)
def test_the_cpu_kernels_serve_whatever_is_one_map_per_feature_over_two_runs_of_axes(
    options: dict[str, Any], kernel: str
) -> None:
    layer = BatchNormalization(**options)
    layer(np.random.default_rng(0).normal(size=(4, 2, 5, 3)), training=True)
    assert layer.kernel == kernel


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


# Saving and loading


def save(path: Path, layer: BatchNormalization) -> None:
    arrays: dict[str, Any] = layer.variables
    np.savez(path, **arrays)


@given(case=cases(sizes=(1, 2, 3), steps=3, most=60))
def test_a_saved_layer_goes_on_from_where_it_was(case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("saved") / "layer.npz"
    first, second, third = case.shapes
    layer = case.layer()
    layer(case.x(first, 0), training=True)
    save(path, layer)
    other = case.layer()
    with np.load(path) as saved:
        other.load(saved)
    x, then = case.x(second, 1), case.x(third, 2)
    assert other(x, training=True).tobytes() == layer(x, training=True).tobytes()
    assert other(then).tobytes() == layer(then).tobytes()
    for name, value in layer.variables.items():
        assert other.variables[name].tobytes() == value.tobytes()
    assert list(other.variables) == list(layer.variables)


def test_a_saved_layer_is_a_plain_archive_of_its_variables_by_name(tmp_path: Path) -> None:
    layer = BatchNormalization(renorm=True)
    layer(np.ones((2, 3)), training=True)
    save(tmp_path / "layer.npz", layer)
    assert zipfile.ZipFile(tmp_path / "layer.npz").namelist() == [f"{name}.npy" for name in NAMES]


@pytest.mark.parametrize("again", [lambda layer: pickle.loads(pickle.dumps(layer)), copy.deepcopy])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "initializer", [0.5, [0.5, 1.0, 2.0], np.full(3, 0.5), "ones", np.ones], ids=lambda part: str(part)[:12]
)
def test_a_pickled_or_copied_layer_goes_on_by_itself(initializer: Any, steps: int, again: Any) -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, (8, 3))
    layer = BatchNormalization(
        gamma_initializer=initializer,
        moving_variance_initializer=initializer,
        renorm=True,
        renorm_clipping={"rmax": 3.0},
        virtual_batch_size=2,
        dtype=np.float32,
    )
    for _ in range(steps):
        layer(x, training=True)
    other = again(layer)
    alone = other(x, training=True)
    assert layer(x, training=True).tobytes() == alone.tobytes()
    assert layer(x).tobytes() == other(x).tobytes()
    for name, value in layer.variables.items():
        assert other.variables[name].tobytes() == value.tobytes()
        assert not np.shares_memory(other.variables[name], value)


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    layer = BatchNormalization()
    tracemalloc.start()
    try:
        for size in range(1, 2_000):
            layer(np.zeros((size, 2), np.float32), training=size % 2 == 0)
        before, _ = tracemalloc.get_traced_memory()
        for size in range(2_000, 5_000):
            layer(np.zeros((size, 2), np.float32), training=size % 2 == 0)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000  # 30 bytes a shape; what is remembered of one takes a thousand


def test_loading_copies() -> None:
    mine = {"gamma": np.ones(2), "beta": np.zeros(2), "moving_mean": np.zeros(2), "moving_variance": np.ones(2)}
    layer = BatchNormalization(momentum=0.5)
    layer.load(mine)
    layer(np.full((3, 2), 8.0), training=True)
    layer.variables["gamma"][...] = 5.0
    assert mine["moving_mean"].tolist() == [0.0, 0.0]
    assert mine["gamma"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("built", [False, True])
def test_loaded_whole_numbers_are_averaged_as_the_floats_that_they_are(built: bool) -> None:
    layer = BatchNormalization(momentum=0.5)
    if built:
        layer.build((None, 1), np.float64)
    layer.load({"gamma": [2], "beta": [1], "moving_mean": [0], "moving_variance": [4]})
    layer(np.array([[1.0], [2.0]]), training=True)
    assert layer.moving_mean.tolist() == [0.75]
    assert layer.moving_variance.tolist() == [2.125]


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3)])
def test_a_renorm_checkpoint_of_the_older_generation_is_converted(built: bool, shape: tuple[int, ...]) -> None:
    older = {
        "gamma": np.ones(3),
        "beta": np.zeros(3),
        "moving_mean": np.array([1.0, 2.0, 3.0]),
        "moving_variance": np.array([0.25, 1.0, 4.0]),
        "renorm_mean": np.array([0.5, 1.0, -2.0]),
        "renorm_mean_weight": np.array(0.5),
        "renorm_stddev": np.array([0.5, 0.25, 1.0]),
        "renorm_stddev_weight": np.array(0.25),
    }
    layer = BatchNormalization(renorm=True, epsilon=0.25)
    if built:
        layer.build((None, 3), np.float64)
    layer.load(older)
    oracle = Oracle.build((1, 3), renorm=True, epsilon=0.25)
    oracle.variables |= {
        "moving_mean": older["moving_mean"].copy(),
        "moving_variance": older["moving_variance"].copy(),
        "moving_stddev": np.sqrt([0.5, 1.25, 4.25]),
        "renorm_mean": np.array([1.0, 2.0, -4.0]),
        "renorm_stddev": np.array([2.0, 1.0, 4.0]),
    }
    same_state(layer, oracle, 2, "float64")
    x = np.random.default_rng(0).normal(size=shape)
    near(layer(x), oracle.infer(x), "float64")
    near(layer(x, training=True), oracle.train(x), "float64")
    same_state(layer, oracle, 2, "float64")


def test_a_renorm_checkpoint_serves_a_layer_without_renorm() -> None:
    layer = BatchNormalization(renorm=True)
    x = np.random.default_rng(0).normal(size=(4, 3))
    layer(x, training=True)
    plain = BatchNormalization()
    plain.load(layer.variables)
    assert list(plain.variables) == ["gamma", "beta", "moving_mean", "moving_variance"]
    assert plain(x).tolist() == layer(x).tolist()


@pytest.mark.parametrize("name", ["gamma", "beta", "moving_mean", "moving_variance"])
def test_a_missing_variable_is_named_and_nothing_is_taken_over(name: str) -> None:
    layer = BatchNormalization()
    layer.build((None, 2))
    before = dict(layer.variables)
    with pytest.raises(KeyError, match=f"missing.*{name}"):
        layer.load({key: np.full(2, 9.0) for key in before if key != name})
    assert all(layer.variables[key] is value for key, value in before.items())


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance", "renorm_mean_weight", "renorm_stddev"])
def test_what_an_older_checkpoint_lacks_is_named_too(name: str) -> None:
    older = {
        "gamma": 1.0,
        "beta": 0.0,
        "moving_mean": 0.0,
        "moving_variance": 1.0,
        "renorm_mean": 0.0,
        "renorm_mean_weight": 1.0,
        "renorm_stddev": 1.0,
        "renorm_stddev_weight": 1.0,
    }
    with pytest.raises(KeyError, match=f"variables must hold.*{name}"):
        BatchNormalization(renorm=True).load({key: np.array([value]) for key, value in older.items() if key != name})


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_of_another_shape_is_refused_by_name_before_anything_is_changed(name: str) -> None:
    layer = BatchNormalization(renorm=True)
    layer.build((None, 2))
    before = dict(layer.variables)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2,\); received shape \(3,\)"):
        layer.load({key: np.full(3 if key == name else 2, 9.0) for key in before})
    assert all(layer.variables[key] is value for key, value in before.items())


def test_a_variable_loaded_before_building_is_checked_at_the_first_call_which_builds_nothing() -> None:
    layer = BatchNormalization()
    layer.load({name: np.ones(3) for name in NAMES})
    with pytest.raises(ValueError, match=r"must have shape \(2,\); received shape \(3,\)"):
        layer(np.ones((4, 2)), training=True)
    assert {value.tolist()[0] for value in layer.variables.values()} == {1.0}
    assert layer(np.ones((4, 3))).shape == (4, 3)


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
