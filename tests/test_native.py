"""The extension module itself, against NumPy in float64; and what is asked of it at its boundary."""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .oracle import differences

library: Any = importlib.import_module("batchnorm._native")
"""Not there is a failure: the rest of the package can do without it, these tests cannot."""

Array = npt.NDArray[Any]
Pair = tuple[Array, Array]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
NEAR = {"float64": 1e-11, "float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""Of results stored in a type, relative to the largest of them."""
THREADED = 1 << 15
"""Values from which a call uses several threads."""
EPSILON = 1e-3


class View(NamedTuple):
    """x[rows][features][inner]; row r is in group (r / span) % groups, which has parameters of its own or not."""

    rows: int
    groups: int
    span: int
    features: int
    inner: int
    own: bool = False

    @property
    def size(self) -> int:
        return self.rows * self.features * self.inner

    @property
    def statistics(self) -> tuple[int, int]:
        return self.groups, self.features

    @property
    def parameters(self) -> int:
        return self.groups * self.features if self.own else self.features


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = library.num_threads()
    library.set_num_threads(2)
    yield
    library.set_num_threads(before)


@st.composite
def views(draw: st.DrawFn) -> View:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5, 13]))
    span = draw(st.sampled_from([1, 1, 2, 3, 7]))
    features = draw(st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 31, 64, 67, 129, 257, 515, 1031, 4099]))
    inner = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 7, 16, 31, 67, 131, 4099]))
    one = groups * span * features * inner
    if one > 200_000:
        inner, one = 1, groups * span * features
    if one > 200_000:
        span, one = 1, groups * features
    above = -(-THREADED // one)  # the first that uses threads
    times = draw(
        st.sampled_from([1, 2, 3, 7, 8, 9, 63, 64, 65, 129, above, above, above + 1, 2 * above + 1, 5 * above])
    )
    rows = min(times, max(1, 300_000 // one)) * groups * span
    return View(rows, groups, span, features, inner, draw(st.booleans()))


types = st.sampled_from(TYPES)
kinds = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64)])
seeds = st.integers(0, 2**16)


def drawn(view: View, dtype: np.dtype[Any], seed: int, mean: float = 3.0, spread: float = 2.0) -> Array:
    return np.random.default_rng(seed).normal(mean, spread, view.size).astype(np.float32).astype(dtype)


def raw(x: Array) -> Array:
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x


def like(x: Array) -> Array:
    return np.full(x.shape, 77, x.dtype)


def apart(values: Array, view: View) -> Array:
    """Values in float64 by (repeat, group, place in its span, feature, place in the inner run)."""
    return values.astype(np.float64).reshape(-1, view.groups, view.span, view.features, view.inner)


def along(statistics: Array, view: View) -> Array:
    """Statistics, or parameters, to go with `apart`."""
    return statistics.astype(np.float64).reshape(1, -1, 1, view.features, 1)


def over(values: Array) -> Array:
    summed: Array = values.sum(axis=(0, 2, 4))
    return summed


def by_parameter(statistics: Array, view: View) -> Array:
    """Sum over the groups that share a parameter."""
    return statistics if view.own else statistics.sum(axis=0)


def measured(x: Array, view: View) -> Pair:
    values = apart(x, view)
    return values.mean(axis=(0, 2, 4)), values.var(axis=(0, 2, 4))


def check(found: Array, expected: Array, near: float, scale: Array | float = 0.0) -> None:
    expected = expected.reshape(found.shape)
    scale = np.broadcast_to(scale, found.shape) if np.ndim(scale) == 0 else np.reshape(scale, found.shape)
    with np.errstate(invalid="ignore"):
        off = np.abs(found.astype(np.float64) - expected)
    allowed = near * np.maximum(np.abs(expected), scale)
    bad = ~(off <= allowed + 1e-300)
    assert not bad.any(), f"{bad.sum()} of {bad.size}, by {np.max(off[bad] / np.maximum(allowed[bad], 1e-300))} times"


class Options(NamedTuple):
    gamma: Array | None = None
    beta: Array | None = None
    adjustment: Pair | None = None
    renorm: Pair | None = None
    limits: tuple[float, float, float] = (-np.inf, np.inf, np.inf)


@st.composite
def options(draw: st.DrawFn, count: int, kind: np.dtype[Any]) -> Options:
    random = np.random.default_rng(draw(seeds))

    def values(low: float, high: float) -> Array:
        return random.uniform(low, high, count).astype(kind)

    gamma = values(0.5, 2) if draw(st.booleans()) else None
    beta = values(-1, 1) if draw(st.booleans()) else None
    adjustment = (values(0.5, 2), values(-1, 1)) if draw(st.booleans()) else None
    renorm = (values(2, 4), values(1, 3)) if draw(st.booleans()) else None
    limits = draw(st.sampled_from([(-np.inf, np.inf, np.inf), (0.9, 1.1, 0.1), (0.5, np.inf, 0.0)]))
    return Options(gamma, beta, adjustment, renorm, limits)


class Forward(NamedTuple):
    y: Array
    mean: Array
    variance: Array
    r: Array | None
    d: Array | None


def forward(view: View, x: Array, kind: Any = np.float32, given: Options | None = None) -> Forward:
    o = given or Options()
    y, mean, variance = like(x), np.empty(view.statistics, kind), np.empty(view.statistics, kind)
    r, d = (None, None) if o.renorm is None else (np.empty(view.parameters, kind), np.empty(view.parameters, kind))
    library.forward(
        *view, raw(x), raw(y), EPSILON, o.gamma, o.beta, *(o.adjustment or (None, None)),
        *(o.renorm or (None, None)), *o.limits, mean, variance, r, d,
    )  # fmt: skip
    return Forward(y, mean, variance, r, d)


class Backward(NamedTuple):
    dx: Array
    dgamma: Array
    dbeta: Array
    dscale: Array
    dbias: Array


def backward(view: View, x: Array, dy: Array, result: Forward, given: Options | None = None) -> Backward:
    o, kind = given or Options(), result.mean.dtype
    dx, grads = like(x), [np.empty(view.parameters, kind) for _ in range(4)]
    library.backward(
        *view, raw(x), raw(dy), raw(dx), EPSILON, result.mean, result.variance, o.gamma, result.r, result.d,
        *(o.adjustment or (None, None)), *grads,
    )  # fmt: skip
    return Backward(dx, *grads)


def moments(view: View, x: Array, kind: Any = np.float32) -> Pair:
    mean, variance = np.empty(view.statistics, kind), np.empty(view.statistics, kind)
    library.moments(*view, raw(x), mean, variance)
    return mean, variance


def same(one: Any, other: Any) -> bool:
    """Whether results are equal to the bit."""
    return all((a is None and b is None) or a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


# ---- The four passes, and the two operations.


@given(views(), types, kinds, seeds)
def test_moments_are_the_mean_and_the_biased_variance_of_each_group_and_feature(
    view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    x = drawn(view, dtype, seed)
    mean, variance = moments(view, x, kind)
    expected, spread = measured(x, view)
    near = 1e-11 if dtype == kind == np.float64 else 2e-6
    check(mean, expected, near, 1.0)
    check(variance, spread, near, 1.0)


@given(views(), types, kinds, seeds)
def test_scale_shift_is_one_multiplication_and_one_addition(
    view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    x, y = drawn(view, dtype, seed), np.empty(view.size, dtype)
    random = np.random.default_rng(seed)
    scale, shift = (random.normal(size=view.statistics).astype(kind) for _ in range(2))
    library.scale_shift(*view, raw(x), raw(y), scale, shift)
    product = apart(x, view) * along(scale, view)
    check(y, product + along(shift, view), NEAR[dtype.name], np.abs(product) + 0 * apart(x, view))


@given(views(), types, kinds, seeds)
def test_gradient_sums_are_those_of_dy_and_of_dy_times_the_centered_input(
    view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1, 0.5, 1.0)
    mean = np.random.default_rng(seed).normal(3, 1, view.statistics).astype(kind)
    plain, centered = np.empty(view.statistics, kind), np.empty(view.statistics, kind)
    library.gradient_sums(*view, raw(x), raw(dy), mean, plain, centered)
    upstream = apart(dy, view)
    products = upstream * (apart(x, view) - along(mean, view))
    near = 1e-11 if dtype == kind == np.float64 else 2e-6
    check(plain, over(upstream), near, over(np.abs(upstream)))
    check(centered, over(products), near, over(np.abs(products)) + over(np.abs(upstream)))


@given(views(), types, kinds, seeds)
def test_gradient_combine_is_the_map_that_it_is_given(
    view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    x, dy, dx = drawn(view, dtype, seed), drawn(view, dtype, seed + 1), np.empty(view.size, dtype)
    random = np.random.default_rng(seed)
    by_dy, by_x, constant = (random.normal(size=view.statistics).astype(kind) for _ in range(3))
    library.gradient_combine(*view, raw(x), raw(dy), raw(dx), by_dy, by_x, constant)
    terms = (apart(dy, view) * along(by_dy, view), apart(x, view) * along(by_x, view), along(constant, view))
    check(dx, sum(terms), NEAR[dtype.name], sum(np.abs(term) for term in terms))  # type: ignore[arg-type]


@given(st.data(), views(), types, kinds, seeds)
def test_forward_is_the_formula_with_every_option(
    data: st.DataObject, view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    o = data.draw(options(view.parameters, kind))
    x = drawn(view, dtype, seed)
    found = forward(view, x, kind, o)
    mean, variance = measured(x, view)
    exact = dtype == kind == np.float64
    check(found.mean, mean, 1e-11 if exact else 2e-6, 1.0)
    check(found.variance, variance, 1e-11 if exact else 2e-6, 1.0)
    y = (apart(x, view) - along(mean, view)) / np.sqrt(along(variance, view) + EPSILON)
    if o.renorm is not None:
        assert found.r is not None
        assert found.d is not None
        floor = np.maximum(o.renorm[1].astype(np.float64), np.sqrt(EPSILON))
        average = [by_parameter(one, view).ravel() / (1 if view.own else view.groups) for one in (mean, variance)]
        r = np.clip(np.sqrt(average[1] + EPSILON) / floor, *o.limits[:2])
        d = np.clip((average[0] - o.renorm[0]) / floor, -o.limits[2], o.limits[2])
        check(found.r, r, 1e-11 if exact else 2e-5, 1.0)
        check(found.d, d, 1e-11 if exact else 2e-5, 1.0)
        y = y * along(r, view) + along(d, view)
    if o.adjustment is not None:
        y = y * along(o.adjustment[0], view) + along(o.adjustment[1], view)
    if o.gamma is not None:
        y = y * along(o.gamma, view)
    if o.beta is not None:
        y = y + along(o.beta, view)
    check(found.y, y, NEAR[dtype.name] if exact else max(NEAR[dtype.name], 5e-5), 8.0)


@given(st.data(), views(), types, kinds, seeds)
def test_backward_is_the_formula_with_every_option(
    data: st.DataObject, view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    o = data.draw(options(view.parameters, kind))
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1, 0.2, 1.0)
    mean, variance = (one.astype(kind) for one in measured(x, view))
    ones, zeros = np.ones(view.parameters), np.zeros(view.parameters)
    r, d = (None, None)
    if o.renorm is not None:
        r, d = o.renorm  # any numbers do
    found = backward(view, x, dy, Forward(x, mean, variance, r, d), o)

    g, (a, b) = ones if o.gamma is None else o.gamma, o.adjustment or (ones, zeros)
    sigma = np.sqrt(along(variance, view) + EPSILON)
    normal = (apart(x, view) - along(mean, view)) / sigma
    upstream = apart(dy, view)
    corrected = normal * along(ones if r is None else r, view) + along(zeros if d is None else d, view)
    k = along(g, view) * along(a, view) * along(ones if r is None else r, view) / sigma
    count = view.rows // view.groups * view.inner
    by_mean = over(upstream) / count
    by_normal = over(upstream * normal) / count
    dx = k * (upstream - along(by_mean, view) - normal * along(by_normal, view))
    bound = k * (np.abs(upstream) + along(over(np.abs(upstream)) / count, view) * (1 + np.abs(normal)))
    exact = dtype == kind == np.float64
    check(found.dx, dx, max(NEAR[dtype.name], 1e-11 if exact else 5e-5), bound + np.abs(k * normal))
    near = 1e-10 if exact else 2e-5

    def total(values: Array) -> Array:
        return by_parameter(over(values), view)

    size = total(np.abs(upstream) * (1 + np.abs(corrected))) * 4 + 1
    check(found.dgamma, total(upstream * (corrected * along(a, view) + along(b, view))), near, size)
    check(found.dbeta, total(upstream), near, size)
    check(found.dscale, total(upstream * corrected * along(g, view)), near, size)
    check(found.dbias, total(upstream * along(g, view)), near, size)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize(
    "view",
    [View(12, 1, 1, 3, 1), View(12, 2, 3, 3, 1), View(4, 1, 1, 2, 3), View(6, 3, 2, 2, 3), View(6, 6, 1, 2, 2),
     View(12, 2, 3, 3, 1, True), View(12, 3, 2, 2, 3, True)],
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(view: View, renorm: bool) -> None:
    random = np.random.default_rng(0)
    gamma, beta, scale, bias = (random.uniform(0.5, 2, view.parameters) for _ in range(4))
    x, dy = random.normal(3, 2, view.size), random.normal(size=view.size)
    # Clipped to what they then are, r and d do not depend on x, as they must not to the gradient.
    pair = (np.full(view.parameters, -9.0), np.full(view.parameters, 0.5)) if renorm else None
    limits = (0.8, 0.8, 0.25)

    def loss(*values: Array) -> float:
        x, gamma, beta, scale, bias = values
        found = forward(view, x, np.float64, Options(gamma, beta, (scale, bias), pair, limits))
        return float(np.dot(found.y, dy))

    o = Options(gamma, beta, (scale, bias), pair, limits)
    found = backward(view, x, dy, forward(view, x, np.float64, o), o)
    at = [x, gamma, beta, scale, bias]
    for i, gradient in enumerate(found):

        def moved(one: Array, i: int = i) -> float:
            return loss(*(one if k == i else value for k, value in enumerate(at)))

        expected = differences(moved, at[i])
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


def test_gradients_that_nobody_asks_for_are_left_out() -> None:
    view = View(6, 1, 1, 3, 1)
    x, dy, dx = drawn(view, TYPES[0], 0), drawn(view, TYPES[0], 1), np.empty(view.size, np.float32)
    result = forward(view, x)
    nothing = [None] * 9
    library.backward(*view, x, dy, dx, EPSILON, result.mean, result.variance, *nothing)
    assert dx.tobytes() == backward(view, x, dy, result).dx.tobytes()


# ---- 16 bits.


@pytest.mark.parametrize("shape", [(1, 65536, 1), (65536, 1, 1), (1, 1, 65536), (2, 16384, 2), (1, 4096, 16)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_every_16_bit_number_comes_back_as_it_was(dtype: np.dtype[Any], shape: tuple[int, int, int]) -> None:
    rows, features, inner = shape
    bits = np.arange(65536, dtype=np.uint16)
    x, y = bits.view(dtype), np.empty(65536, dtype)
    # Adding −0 leaves every number, zeros of either sign among them, as it is.
    one, zero = np.ones(features, np.float32), np.full(features, -0.0, np.float32)
    library.scale_shift(*View(rows, 1, 1, features, inner), raw(x), raw(y), one, zero)
    nan = np.isnan(x.astype(np.float32))
    assert np.isnan(y.astype(np.float32)).tolist() == nan.tolist()
    assert y.view(np.uint16)[~nan].tolist() == bits[~nan].tolist()


def rounded(values: Array, dtype: np.dtype[Any], inner: int) -> Array:
    """What float32 values become where they are stored."""
    x = np.ones(values.size * inner, dtype)
    y = like(x)
    library.scale_shift(*View(1, 1, 1, values.size, inner), raw(x), raw(y), values, np.full_like(values, -0.0))
    columns: Array = y.reshape(values.size, inner)
    assert all(columns[:, i].tobytes() == columns[:, 0].tobytes() for i in range(inner))
    return columns[:, 0].copy()


def check_rounding(values: Array, dtype: np.dtype[Any], inner: int) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(dtype)
    found, nan = rounded(values, dtype, inner), np.isnan(values)
    assert np.isnan(found.astype(np.float32)).tolist() == nan.tolist()
    assert found[~nan].tobytes() == expected[~nan].tobytes()


@given(
    st.lists(
        st.floats(width=32) | st.floats(-70000, 70000, width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32),
        min_size=1,
    ),
    st.sampled_from([np.dtype(np.float16), BFLOAT16]),
    st.sampled_from([1, 3, 17]),
)
def test_drawn_values_are_rounded_to_nearest_even(values: list[float], dtype: np.dtype[Any], inner: int) -> None:
    check_rounding(np.array(values, np.float32), dtype, inner)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_values_halfway_between_two_numbers_and_beside_it_are_rounded_to_nearest_even(
    dtype: np.dtype[Any], inner: int
) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    exponent = np.uint16(0x7C00 if dtype == np.float16 else 0x7F80)
    numbers = bits[bits & exponent != exponent].view(dtype).astype(np.float64)
    halfway = ((numbers[:-1] + numbers[1:]) / 2).astype(np.float32)
    values = [halfway, np.nextafter(halfway, np.float32(np.inf)), np.nextafter(halfway, np.float32(-np.inf))]
    largest = np.array([65519.996, 65520, 65520.004, 65536, 3.3895e38, 3.4e38, 3.4028235e38, np.inf], np.float32)
    check_rounding(np.concatenate([*values, largest, -largest]), dtype, inner)


# ---- Numbers that are hard.


LAYOUTS = {
    "rows": View(8, 1, 1, 100_000, 1),
    "channels-first": View(10, 1, 1, 8, 10_000),
    "channels-first, short": View(100_000, 1, 1, 3, 2),
    "channels-last": View(100_000, 1, 1, 4, 1),
    "wide": View(5_000, 1, 1, 300, 1),
    "one feature": View(1_000_003, 1, 1, 1, 1),
    "virtual batches": View(96_000, 4, 3, 7, 1),
    "virtual batches, channels-first": View(64, 4, 2, 5, 1_001),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_stays_right_where_the_mean_is_large_beside_the_spread(layout: str) -> None:
    view = LAYOUTS[layout]
    x = drawn(view, TYPES[0], 0, 1e4, 1.0)
    mean, variance = measured(x, view)
    for found in (moments(view, x, np.float64), forward(view, x, np.float64)[1:3]):
        np.testing.assert_allclose(found[0], mean, rtol=1e-7)
        np.testing.assert_allclose(found[1], variance, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [0.0, -1e4, 1e5])
def test_a_first_part_unlike_the_rest_does_not_spoil_the_variance(layout: str, first: float) -> None:
    # The first values say what sums are measured from. Where a hundredth of all is far away the variance is large,
    # and rounding is to be small beside that.
    view = LAYOUTS[layout]
    x = drawn(view, TYPES[0], 0, 1e4, 1.0).reshape(view.rows, -1)
    x[: max(1, view.rows // 100)] = first
    mean, variance = measured(x, view)
    found = moments(view, x, np.float64)
    np.testing.assert_allclose(found[0], mean, rtol=1e-6)
    np.testing.assert_allclose(found[1], variance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "view", [View(9, 1, 1, 5, 1), View(40_000, 1, 1, 3, 1), View(6, 2, 1, 3, 40), View(8, 4, 2, 5, 1)]
)
def test_a_constant_feature_has_no_variance_and_its_mean_exactly(view: View) -> None:
    for dtype in TYPES:
        mean, variance = moments(view, np.full(view.size, 3.25, dtype))
        assert (mean == 3.25).all()
        assert (variance == 0).all()


@settings(max_examples=40)
@given(st.data(), views(), types, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_nan_and_infinity_stay_in_their_feature_and_group(
    data: st.DataObject, view: View, dtype: np.dtype[Any], value: float
) -> None:
    at = data.draw(st.integers(0, view.size - 1))
    x, dy = drawn(view, dtype, 0), drawn(view, dtype, 1)
    spoilt = x.copy()
    spoilt[at] = value
    row, feature, _ = np.unravel_index(at, (view.rows, view.features, view.inner))
    group = row // view.span % view.groups
    untouched = np.ones(
        (view.rows // view.span // view.groups, view.groups, view.span, view.features, view.inner), bool
    )
    untouched[:, group, :, feature] = False
    healthy = np.ones(view.statistics, bool)
    healthy[group, feature] = False
    others = healthy.reshape(-1) if view.own else healthy[group]

    before, after = forward(view, x), forward(view, spoilt)
    assert same([one[healthy] for one in before[1:3]], [one[healthy] for one in after[1:3]])
    assert not np.isfinite(after.variance[group, feature])
    assert same([before.y[untouched.reshape(-1)]], [after.y[untouched.reshape(-1)]])
    one, other = backward(view, x, dy, before), backward(view, spoilt, dy, after)
    assert same([one.dx[untouched.reshape(-1)]], [other.dx[untouched.reshape(-1)]])
    assert same([gradient[others] for gradient in one[1:]], [gradient[others] for gradient in other[1:]])


# ---- Threads.


BUSY = [
    View(5_003, 1, 1, 17, 1), View(40_009, 1, 1, 3, 1), View(70, 1, 1, 1_031, 1), View(2, 1, 1, 40_000, 1),
    View(60, 1, 1, 37, 97), View(6_000, 5, 2, 13, 1), View(60, 5, 2, 37, 31), View(1, 1, 1, 1, 70_001),
]  # fmt: skip


def everything(view: View, dtype: np.dtype[Any] = TYPES[0], seed: int = 0) -> list[Array]:
    """The results of all operations on a view."""
    random = np.random.default_rng(seed)
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1)
    values = [random.uniform(0.5, 2, view.features).astype(np.float32) for _ in range(6)]
    o = Options(values[0], values[1], (values[2], values[3]), (values[4], values[5]), (0.5, 2.0, 1.0))
    plain, full = forward(view, x), forward(view, x, given=o)
    statistics = [random.normal(size=view.statistics).astype(np.float32) for _ in range(3)]
    y, dx, one, other = like(x), like(x), np.empty_like(statistics[0]), np.empty_like(statistics[0])
    library.scale_shift(*view, raw(x), raw(y), *statistics[:2])
    library.gradient_sums(*view, raw(x), raw(dy), statistics[0], one, other)
    library.gradient_combine(*view, raw(x), raw(dy), raw(dx), *statistics)
    results = [*plain, *full, *backward(view, x, dy, plain), *backward(view, x, dy, full, o), *moments(view, x)]
    return [result for result in [*results, y, dx, one, other] if result is not None]


def check_near(found: list[Array], expected: list[Array], near: float) -> None:
    for one, other in zip(found, expected, strict=True):
        exact = other.astype(np.float64)
        np.testing.assert_allclose(one.astype(np.float64), exact, rtol=near, atol=near * np.abs(exact).max())


@pytest.mark.parametrize("view", BUSY, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads_beyond_rounding(view: View, dtype: np.dtype[Any]) -> None:
    library.set_num_threads(1)
    alone = everything(view, dtype)
    for threads in (2, 3, 8):
        library.set_num_threads(threads)
        check_near(everything(view, dtype), alone, NEAR[dtype.name])


@pytest.mark.parametrize("view", BUSY, ids=str)
def test_the_same_call_gives_the_same_bits(view: View) -> None:
    for threads in (1, 3):
        library.set_num_threads(threads)
        first = everything(view)
        assert all(same(first, everything(view)) for _ in range(5))


def test_many_python_threads_at_once_get_what_one_gets() -> None:
    library.set_num_threads(3)
    jobs = list(itertools.product(BUSY, TYPES, range(3)))
    expected = [everything(*job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found, one in zip(pool.map(lambda job: everything(*job), jobs), expected, strict=True):
            assert same(found, one)


def test_the_number_of_threads_may_change_while_calls_run() -> None:
    # How a call is cut into pieces goes by that number, and so does the memory for their sums.
    expected = {view: everything(view) for view in BUSY}
    stop = threading.Event()

    def change() -> None:
        for threads in itertools.cycle([1, 7, 2, 16, 3]):
            if stop.wait(0.0005):  # which also leaves the interpreter to the others
                return
            library.set_num_threads(threads)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for view, found in zip(BUSY * 6, pool.map(everything, BUSY * 6), strict=True):
                check_near(found, expected[view], NEAR["float32"])
    finally:
        stop.set()
        changing.join()


@pytest.mark.parametrize("threads", [0, -1, -(2**40)])
def test_fewer_than_one_thread_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        library.set_num_threads(threads)
    assert library.num_threads() == 2


@pytest.mark.parametrize("threads", ["2", 2.5, None])
def test_a_number_of_threads_that_is_no_int_is_refused(threads: Any) -> None:
    with pytest.raises(TypeError):
        library.set_num_threads(threads)
    assert library.num_threads() == 2


# ---- Processes of their own.


ROOT = pathlib.Path(__file__).parents[1]


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_native import *\n" + textwrap.dedent(code), *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=120,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def instruction_sets() -> list[str]:
    """Those of this processor."""
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ["baseline"]
    found = ["baseline"]
    if {"avx2", "fma", "f16c"} <= flags:
        found.append("avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        found.append("avx512")
        if "avx512_bf16" in flags:
            found.append("avx512bf16")
    return found


def test_the_best_instruction_set_serves_unless_another_is_asked_for() -> None:
    if not os.environ.get("BATCHNORM_ISA"):
        assert library.instruction_set() == instruction_sets()[-1]


@pytest.mark.parametrize("name", instruction_sets())
def test_every_instruction_set_gives_the_same_within_rounding(name: str, tmp_path: pathlib.Path) -> None:
    code = """
        library.set_num_threads(2)
        results = [one.astype(np.float64) for view in BUSY for dtype in TYPES for one in everything(view, dtype)]
        np.savez(sys.argv[1], *results)
        print(library.instruction_set())
    """
    assert run(code, str(tmp_path / "found.npz"), BATCHNORM_ISA=name).strip() == name
    with np.load(tmp_path / "found.npz") as file:
        found = iter([file[key] for key in file])
        for view, dtype in itertools.product(BUSY, TYPES):
            expected = everything(view, dtype)
            check_near([next(found) for _ in expected], expected, NEAR[dtype.name])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
        import multiprocessing, signal, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what this is about
        library.set_num_threads(3)
        view = View(5_003, 1, 1, 17, 1)
        expected = everything(view)
        stop = threading.Event()

        def busy():
            while not stop.is_set():
                everything(view)

        others = [threading.Thread(target=busy) for _ in range(2)]
        for round in range(6):
            if round == 3:  # from here on while other threads hold the pool
                for other in others: other.start()
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                os._exit(0 if all(same(everything(view), expected) for _ in range(3)) else 1)
            assert os.waitpid(child, 0)[1] == 0, "forked"
            assert round > 2 or same(everything(view), expected)
        stop.set()
        for other in others: other.join()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for found in pool.map_async(everything, [view] * 4).get(60):
                assert same(found, expected)
        print("done")
    """
    assert run(code).strip() == "done"


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory the way of Linux")
LIMIT = """
    import resource

    def limit(more):
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
"""


@linux
def test_where_no_more_threads_are_to_be_had_those_there_are_do_it() -> None:
    code = """
        view = View(60_000, 1, 1, 3, 1)
        x = drawn(view, TYPES[0], 0)
        expected, mean, variance = moments(view, x), *moments(view, x)
        mean[:] = variance[:] = 0
        library.set_num_threads(10**9)
        assert library.num_threads() == 1024
        limit(100 << 20)
        library.moments(*view, x, mean, variance)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert len(os.listdir("/proc/self/task")) < 100
        check_near([mean, variance], list(expected), NEAR["float32"])
        print("done")
    """
    assert run(textwrap.dedent(LIMIT) + textwrap.dedent(code)).strip() == "done"


@linux
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_memory_that_is_not_to_be_had_is_an_error_of_the_caller_whichever_thread_asks(threads: int) -> None:
    code = """
        threads = int(sys.argv[1])
        library.set_num_threads(threads)
        small = View(5_003, 1, 1, 17, 1)
        expected = everything(small)
        view = View(16, 8, 1, 1_500_000, 1)
        x, y = np.zeros(view.size, np.float32), np.zeros(view.size, np.float32)
        mean, variance = np.zeros(view.statistics, np.float32), np.zeros(view.statistics, np.float32)
        nothing = [None] * 6
        rest = [-1.0, 1.0, 1.0, mean, variance, None, None]
        for _ in range(5):
            limit(20 << 20)
            try:
                library.forward(*view, x, y, EPSILON, *nothing, *rest)
            except MemoryError:
                pass
            else:
                raise AssertionError("there was enough")
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert same(everything(small), expected)
        library.forward(*view, x, y, EPSILON, *nothing, *rest)
        print("done")
    """
    assert run(textwrap.dedent(LIMIT) + textwrap.dedent(code), str(threads)).strip() == "done"


@linux
def test_a_few_wide_rows_need_no_memory_for_every_thread() -> None:
    code = """
        view = View(2, 1, 1, 4_000_000, 1)
        x = drawn(view, TYPES[0], 0)
        mean, variance = np.zeros(view.statistics, np.float32), np.zeros(view.statistics, np.float32)
        library.set_num_threads(16)
        limit(400 << 20)  # for what is 128 MB, and threads
        library.moments(*view, x, mean, variance)
        assert np.allclose(mean, x.reshape(2, -1).mean(axis=0), atol=1e-5)
        print("done")
    """
    assert run(textwrap.dedent(LIMIT) + textwrap.dedent(code)).strip() == "done"


# ---- What is taken and what is refused.


# Larger than what caches are taken to keep, in runs and rows that end within lines of these.
PAST_CACHES = [
    View(11, 1, 1, 3, 250_007),
    View(15, 1, 1, 2003, 301),
    View(45, 1, 1, 40_009, 5),
    View(130_003, 1, 1, 67, 1),
    View(130_000, 13, 2, 64, 1),
    View(2002, 1, 1, 4503, 1),
]


@pytest.mark.parametrize("view", PAST_CACHES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("begin", [0, 5])
def test_large_results_are_whole_wherever_lines_begin_and_in_the_place_of_dy(
    view: View, dtype: np.dtype[Any], begin: int
) -> None:
    def placed(values: Array) -> Array:
        room = np.empty(view.size + begin + 64, dtype)
        offset = -(room.ctypes.data // dtype.itemsize) % (64 // dtype.itemsize) + begin
        room[offset : offset + view.size] = values
        return room[offset : offset + view.size]

    x, y, dx = (placed(drawn(view, dtype, seed)) for seed in (0, 0, 1))
    dy = dx.copy()
    wide = dtype == np.float64
    mean, variance = (np.empty(view.statistics, np.float64 if wide else np.float32) for _ in range(2))
    library.forward(
        *view, raw(x), raw(y), EPSILON, *(None,) * 6, -np.inf, np.inf, np.inf, mean, variance, None, None
    )  # fmt: skip
    normalized = (apart(x, view) - along(mean, view)) / np.sqrt(along(variance, view) + EPSILON)
    check(y, normalized, NEAR[dtype.name], 8.0)
    library.backward_at(
        2, *view, TYPES.index(dtype), wide, x.ctypes.data, dx.ctypes.data, dx.ctypes.data, EPSILON, mean.ctypes.data,
        variance.ctypes.data, *(0,) * 9,
    )  # fmt: skip
    expected = backward(view, x.copy(), dy, Forward(y, mean, variance, None, None)).dx
    assert dx.tobytes() == expected.tobytes()


@settings(max_examples=30)
@given(views(), types)
def test_arrays_may_lie_anywhere_and_inputs_may_be_read_only(view: View, dtype: np.dtype[Any]) -> None:
    def moved(values: Array) -> Array:
        found: Array = np.empty(values.nbytes + 1, np.uint8)[1:].view(values.dtype)
        found[:] = values.reshape(-1)
        assert found.itemsize == 1 or not found.flags.aligned
        return found

    x = drawn(view, dtype, 0)
    expected = forward(view, x)
    gamma = np.ones(view.parameters, np.float32)
    inputs = [moved(raw(x)), moved(gamma), moved(raw(x))]
    for one in inputs:
        one.flags.writeable = False
    y, dx = moved(raw(x)), moved(raw(x))
    mean, variance, dgamma = moved(expected.mean), moved(expected.mean), moved(gamma)
    library.forward(
        *view, inputs[0], y, EPSILON, inputs[1], None, None, None, None, None, 0.0, 0.0, 0.0, mean, variance, None, None
    )
    assert same([y, mean, variance], expected[:3])
    nothing = [None] * 4
    library.backward(
        *view, inputs[0], inputs[2], dx, EPSILON, mean, variance, inputs[1], *nothing, dgamma, None, None, None
    )
    found = backward(view, x, x, expected, Options(gamma))
    assert same([dx, dgamma], found[:2])


@pytest.mark.parametrize("view", [View(0, 1, 1, 3, 1), View(0, 4, 2, 3, 1), View(0, 1, 1, 3, 5), View(0, 2, 3, 3, 7)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_no_rows_have_no_moments_and_no_gradients(view: View, dtype: np.dtype[Any]) -> None:
    x = np.empty(0, dtype)
    gamma = np.ones(3, np.float32)
    o = Options(gamma, gamma, (gamma, gamma), (gamma, gamma))
    found = forward(view, x, given=o)
    assert found.y.size == 0
    assert not found.mean.any()
    assert not found.variance.any()
    for gradient in backward(view, x, x, found, o):
        assert not gradient.any()
    for result in everything(view, dtype):
        assert np.isfinite(result.astype(np.float64)).all()


VIEW = View(12, 2, 3, 4, 2)
OUTPUTS = {
    "forward": ["y", "mean", "variance", "r", "d"],
    "backward": ["dx", "dgamma", "dbeta", "dadjustment_scale", "dadjustment_bias"],
    "moments": ["mean", "variance"],
    "scale_shift": ["y"],
    "gradient_sums": ["dy_sum", "dy_centered_sum"],
    "gradient_combine": ["dx"],
}
BY_FEATURE = [
    "gamma", "beta", "adjustment_scale", "adjustment_bias", "renorm_mean", "renorm_stddev", "r", "d",
    "dgamma", "dbeta", "dadjustment_scale", "dadjustment_bias",
]  # fmt: skip
INPUTS = {
    "forward": ["x", *BY_FEATURE[:6]],
    "backward": ["x", "dy", "mean", "variance", "gamma", "r", "d", "adjustment_scale", "adjustment_bias"],
    "moments": ["x"],
    "scale_shift": ["x", "scale", "shift"],
    "gradient_sums": ["x", "dy", "mean"],
    "gradient_combine": ["x", "dy", "dy_weight", "x_weight", "constant"],
}
LARGE = ["x", "dy", "y", "dx"]


def arguments(operation: str) -> dict[str, Any]:
    """Arguments that an operation accepts, all of them given."""
    found: dict[str, Any] = VIEW._asdict()
    for name in INPUTS[operation] + OUTPUTS[operation]:
        size = VIEW.size if name in LARGE else VIEW.features * (1 if name in BY_FEATURE else VIEW.groups)
        found[name] = np.full(size, 7.0, np.float32)
    if operation == "forward":
        found.update(epsilon=EPSILON, rmin=0.5, rmax=2.0, dmax=1.0)
    if operation == "backward":
        found.update(epsilon=EPSILON)
    return found


def refuses(error: type[Exception], operation: str, given: dict[str, Any], match: str | None = None) -> None:
    """The call fails, and no output has changed."""
    before = {name: given[name].copy() for name in OUTPUTS[operation] if isinstance(given.get(name), np.ndarray)}
    with pytest.raises(error, match=match):
        getattr(library, operation)(**given)
    for name, value in before.items():
        assert given[name].tobytes() == value.tobytes(), name


ARRAYS = [(operation, name) for operation in INPUTS for name in INPUTS[operation] + OUTPUTS[operation]]
WRITTEN = [(operation, name) for operation in OUTPUTS for name in OUTPUTS[operation]]


@pytest.mark.parametrize("operation", INPUTS)
def test_what_the_tests_of_refusals_change_is_accepted_as_it_is(operation: str) -> None:
    given = arguments(operation)
    getattr(library, operation)(**given)
    assert any((given[name] != 7).any() for name in OUTPUTS[operation])


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_an_array_of_another_type_is_a_type_error(operation: str, name: str) -> None:
    size = arguments(operation)[name].size
    swapped = np.zeros(size, np.dtype(np.float32).newbyteorder())
    wrong = [np.zeros(size, kind) for kind in (np.int32, np.int16, np.bool_, np.complex64, np.longdouble, object)]
    wrong += [np.zeros(size, np.float64 if name in LARGE else np.float16)]
    if (operation, name) == ("moments", "x"):
        wrong.pop()  # which it may be, where nothing is to be of the same
    for one in [*wrong, swapped, [0.0] * size, "text", 1.5, object()]:
        refuses(TypeError, operation, {**arguments(operation), name: one})


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_an_array_of_another_size_is_a_value_error(operation: str, name: str) -> None:
    for change in (-1, 1):
        given = arguments(operation)
        given[name] = np.full(given[name].size + change, 7.0, np.float32)
        refuses(ValueError, operation, given, f"{name} must have")
    refuses(ValueError, operation, {**arguments(operation), name: np.zeros(0, np.float32)}, f"{name} must have")


@pytest.mark.parametrize(("operation", "name"), ARRAYS)
def test_an_array_with_gaps_is_a_type_error(operation: str, name: str) -> None:
    size = arguments(operation)[name].size
    gaps = np.full(2 * size, 7.0, np.float32)
    for one in (gaps[::2], gaps[:size][::-1], gaps[:size].reshape(-1, 2).T):
        refuses(TypeError, operation, {**arguments(operation), name: one})


@pytest.mark.parametrize(("operation", "name"), WRITTEN)
def test_an_output_that_is_read_only_is_a_type_error(operation: str, name: str) -> None:
    given = arguments(operation)
    given[name].flags.writeable = False
    refuses(TypeError, operation, given)


@pytest.mark.parametrize(("operation", "name"), WRITTEN)
def test_an_output_that_overlaps_another_array_is_a_value_error(operation: str, name: str) -> None:
    for other in INPUTS[operation] + OUTPUTS[operation]:
        if other == name:
            continue
        given = arguments(operation)
        sizes = given[name].size, given[other].size
        shared = np.full(sum(sizes) - 1, 7.0, np.float32)
        given[name], given[other] = shared[: sizes[0]], shared[sizes[0] - 1 :]  # one value in common
        refuses(ValueError, operation, given, "overlap")
        beside = np.full(sum(sizes), 7.0, np.float32)
        given[name], given[other] = beside[: sizes[0]], beside[sizes[0] :]
        getattr(library, operation)(**given)


@pytest.mark.parametrize("operation", INPUTS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": -12}, {"groups": 0}, {"groups": -2}, {"span": 0}, {"span": -3}, {"features": 0}, {"features": -4},
        {"inner": 0}, {"inner": -2}, {"groups": 5}, {"groups": 4}, {"span": 4}, {"span": 12}, {"rows": 13},
        {"features": -4, "inner": -2}, {"rows": -12, "features": -4},
    ],
    ids=str,
)  # fmt: skip
def test_a_view_that_is_none_is_a_value_error(operation: str, sizes: dict[str, int]) -> None:
    refuses(ValueError, operation, {**arguments(operation), **sizes})


@pytest.mark.parametrize("operation", INPUTS)
@pytest.mark.parametrize(
    "view",
    [
        View(2**62, 1, 1, 4, 1), View(2**32, 1, 1, 2**32, 1), View(1, 1, 1, 2**32, 2**32), View(2**62, 1, 1, 1, 4),
        View(0, 2**32, 1, 2**32, 1), View(0, 1, 1, 4, 2**61), View(0, 1, 1, 4, 2**62), View(0, 2**62, 1, 4, 1),
        View(2**63 - 1, 1, 1, 2, 1), View(0, 1, 1, 2**62, 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_view_whose_size_overflows_is_a_value_error(operation: str, view: View) -> None:
    # The product of sizes may be 0 or small modulo 2**64, and so be that of an array which is much too small.
    given = {**arguments(operation), **view._asdict()}
    for name in INPUTS[operation] + OUTPUTS[operation]:
        kept = 0 if name in LARGE else view.features * (1 if name in BY_FEATURE else view.groups) % 2**64
        given[name] = np.full(kept if kept < 100 else 0, 7.0, np.float32)
    refuses(ValueError, operation, given)


@pytest.mark.parametrize("name", VIEW._fields)
@pytest.mark.parametrize("size", [None, "3", 2.5, 2**64])
def test_a_size_that_is_no_integer_of_64_bits_is_a_type_error(name: str, size: Any) -> None:
    refuses(TypeError, "moments", {**arguments("moments"), name: size})


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        ("forward", ["adjustment_scale", "adjustment_bias"]),
        ("forward", ["renorm_mean", "renorm_stddev", "r", "d"]),
        ("backward", ["adjustment_scale", "adjustment_bias"]),
        ("backward", ["r", "d"]),
    ],
)
def test_what_goes_together_is_refused_by_half(operation: str, names: list[str]) -> None:
    for count in range(1, len(names)):
        for absent in itertools.combinations(names, count):
            refuses(ValueError, operation, {**arguments(operation), **dict.fromkeys(absent)}, "together")
    getattr(library, operation)(**{**arguments(operation), **dict.fromkeys(names)})


@pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, name) for operation, name in ARRAYS if name not in BY_FEATURE],
)
def test_what_every_call_needs_must_be_given(operation: str, name: str) -> None:
    refuses(TypeError, operation, {**arguments(operation), name: None})


def test_any_array_of_the_right_size_will_do_whatever_its_shape() -> None:
    flat, shaped = arguments("forward"), arguments("forward")
    for name, value in shaped.items():
        if isinstance(value, np.ndarray):
            shaped[name] = value.reshape(1, -1, 2, 1)
    library.forward(**flat)
    library.forward(**shaped)
    for name in OUTPUTS["forward"]:
        assert same([flat[name]], [shaped[name]])


# ---- Size.


BEYOND: dict[str, Callable[[int], View]] = {
    "features last": lambda size: View(size // 64, 1, 1, 64, 1),
    "virtual batches": lambda size: View(size // 64, 4, 1, 64, 1),
    "features first": lambda size: View(2, 1, 1, 4, size // 8),
}


def test_arrays_of_more_than_2_to_the_31_values_are_whole() -> None:
    # Zeros that nobody has written take no memory; what is written lies at the beginning, at places that 32 bits cannot
    # tell apart from others, and at the end.
    size = 2**31 + 2**12
    x = np.zeros(size, np.float16)
    places = np.array([0, 77, 2**30 + 1, 2**31 - 1, 2**31, 2**31 + 77, size - 65, size - 1])
    x[places] = 1024.0
    for make in BEYOND.values():
        view = make(size)
        mean, variance = moments(view, x, np.float64)
        row, feature = places // (view.features * view.inner), places // view.inner % view.features
        many = np.zeros(view.statistics)
        np.add.at(many, (row // view.span % view.groups, feature), 1)
        share = many / (view.rows // view.groups * view.inner)
        np.testing.assert_allclose(mean, 1024.0 * share, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(variance, 1024.0**2 * share * (1 - share), rtol=1e-5, atol=1e-9)
