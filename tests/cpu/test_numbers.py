"""What the kernels compute, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import differences

from .cases import (
    BFLOAT16,
    EPSILON,
    NEAR,
    TYPES,
    Array,
    Forward,
    Options,
    View,
    along,
    apart,
    backward,
    by_parameter,
    check,
    drawn,
    forward,
    gradient_combine,
    gradient_sums,
    kernel,
    kinds,
    measured,
    moments,
    normalize,
    options,
    over,
    same,
    seeds,
    types,
    views,
)  # fmt: skip

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
def test_normalize_is_the_centred_map_that_it_is_given(
    view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    x = drawn(view, dtype, seed)
    random = np.random.default_rng(seed)
    mean, scale, offset = (random.normal(size=view.statistics).astype(kind) for _ in range(3))
    product = (apart(x, view) - along(mean, view)) * along(scale, view)
    y = normalize(view, x, mean, scale, offset)
    check(y, product + along(offset, view), NEAR[dtype.name], np.abs(product) + np.abs(along(offset, view)))


@given(views(), types, kinds, seeds)
def test_gradient_sums_are_those_of_dy_and_of_dy_times_the_centered_input(
    view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1, 0.5, 1.0)
    mean = np.random.default_rng(seed).normal(3, 1, view.statistics).astype(kind)
    plain, centered = gradient_sums(view, x, dy, mean)
    upstream = apart(dy, view)
    products = upstream * (apart(x, view) - along(mean, view))
    near = 1e-11 if dtype == kind == np.float64 else 2e-6
    check(plain, over(upstream), near, over(np.abs(upstream)))
    check(centered, over(products), near, over(np.abs(products)) + over(np.abs(upstream)))


@given(views(), types, kinds, seeds)
def test_gradient_combine_is_the_centred_map_that_it_is_given(
    view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1)
    random = np.random.default_rng(seed)
    mean, a, b, c = (random.normal(size=view.statistics).astype(kind) for _ in range(4))
    dx = gradient_combine(view, x, dy, mean, a, b, c)
    distance = apart(x, view) - along(mean, view)
    terms = (apart(dy, view) * along(a, view), distance * along(b, view), along(c, view))
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
        groups = 1 if view.grouped_parameters else view.groups
        average = [by_parameter(moment, view).ravel() / groups for moment in (mean, variance)]
        r = np.clip(np.sqrt(average[1] + EPSILON) / floor, *o.limits[:2])
        d = np.clip((average[0] - o.renorm[0]) / floor, -o.limits[2], o.limits[2])
        check(found.r, r, 1e-11 if exact else 2e-5, 1.0)
        check(found.d, d, 1e-11 if exact else 2e-5, 1.0)
        y = y * along(r, view) + along(d, view)
    if o.factor is not None:
        y = y * along(o.factor, view)
    if o.offset is not None:
        y = y + along(o.offset, view)
    check(found.y, y, NEAR[dtype.name] if exact else max(NEAR[dtype.name], 5e-5), 8.0)


@given(st.data(), views(), types, kinds, seeds)
def test_backward_is_the_formula_with_every_option(
    data: st.DataObject, view: View, dtype: np.dtype[Any], kind: np.dtype[Any], seed: int
) -> None:
    o = data.draw(options(view.parameters, kind))
    x, dy = drawn(view, dtype, seed), drawn(view, dtype, seed + 1, 0.2, 1.0)
    mean, variance = (moment.astype(kind) for moment in measured(x, view))
    ones, zeros = np.ones(view.parameters), np.zeros(view.parameters)
    r, d = (None, None)
    if o.renorm is not None:
        r, d = o.renorm  # any numbers do
    found = backward(view, x, dy, Forward(x, mean, variance, r, d), o)

    factor = ones if o.factor is None else o.factor
    sigma = np.sqrt(along(variance, view) + EPSILON)
    normal = (apart(x, view) - along(mean, view)) / sigma
    upstream = apart(dy, view)
    corrected = normal * along(ones if r is None else r, view) + along(zeros if d is None else d, view)
    k = along(factor, view) * along(ones if r is None else r, view) / sigma
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
    check(found.dfactor, total(upstream * corrected), near, size)
    check(found.doffset, total(upstream), near, size)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize(
    "view",
    [View(12, 1, 1, 3, 1), View(12, 2, 3, 3, 1), View(4, 1, 1, 2, 3), View(6, 3, 2, 2, 3), View(6, 6, 1, 2, 2),
     View(12, 2, 3, 3, 1, True), View(12, 3, 2, 2, 3, True)],
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(view: View, renorm: bool) -> None:
    random = np.random.default_rng(0)
    factor, offset = (random.uniform(0.5, 2, view.parameters) for _ in range(2))
    x, dy = random.normal(3, 2, view.size), random.normal(size=view.size)
    # Clipped to what they then are, r and d do not depend on x, as they must not to the gradient.
    pair = (np.full(view.parameters, -9.0), np.full(view.parameters, 0.5)) if renorm else None
    limits = (0.8, 0.8, 0.25)

    def loss(*values: Array) -> float:
        x, factor, offset = values
        found = forward(view, x, np.float64, Options(factor, offset, pair, limits))
        return float(np.dot(found.y, dy))

    o = Options(factor, offset, pair, limits)
    found = backward(view, x, dy, forward(view, x, np.float64, o), o)
    at = [x, factor, offset]
    for i, gradient in enumerate(found):

        def moved(value: Array, i: int = i) -> float:
            return loss(*(value if k == i else other for k, other in enumerate(at)))

        np.testing.assert_allclose(gradient, differences(moved, at[i]), rtol=1e-6, atol=1e-6)


def test_gradients_that_nobody_asks_for_are_left_out() -> None:
    view = View(6, 1, 1, 3, 1)
    x, dy, dx = drawn(view, TYPES[0], 0), drawn(view, TYPES[0], 1), np.empty(view.size, np.float32)
    result = forward(view, x)
    kernel(view, TYPES[0]).backward(x=x, dy=dy, dx=dx, mean=result.mean, variance=result.variance)
    assert dx.tobytes() == backward(view, x, dy, result).dx.tobytes()


# ---- 16 bits.


@pytest.mark.parametrize("shape", [(1, 65536, 1), (65536, 1, 1), (1, 1, 65536), (2, 16384, 2), (1, 4096, 16)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_every_16_bit_number_comes_back_as_it_was(dtype: np.dtype[Any], shape: tuple[int, int, int]) -> None:
    rows, features, inner = shape
    bits = np.arange(65536, dtype=np.uint16)
    x = bits.view(dtype)
    # Subtracting 0 and adding −0 leave every number, zeros of either sign among them, as it is.
    mean, scale, offset = (np.full((1, features), value, np.float32) for value in (0.0, 1.0, -0.0))
    y = normalize(View(rows, 1, 1, features, inner), x, mean, scale, offset)
    nan = np.isnan(x.astype(np.float32))
    assert np.isnan(y.astype(np.float32)).tolist() == nan.tolist()
    assert y.view(np.uint16)[~nan].tolist() == bits[~nan].tolist()


def rounded(values: Array, dtype: np.dtype[Any], inner: int) -> Array:
    """What float32 values become where they are stored."""
    view = View(1, 1, 1, values.size, inner)
    y = normalize(
        view, np.ones(view.size, dtype), np.zeros_like(values), values, np.full_like(values, -0.0)
    )  # fmt: skip
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
    "virtual batches, wide": View(4_000, 4, 2, 700, 1),
    "virtual batches, few rows": View(96, 4, 3, 700, 1),
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
def test_the_output_stays_right_where_the_mean_is_large_beside_the_spread(layout: str) -> None:
    view = LAYOUTS[layout]
    x = drawn(view, TYPES[0], 0, 1e4, 1.0)
    mean, variance = measured(x, view)
    expected = (apart(x, view) - along(mean, view)) / np.sqrt(along(variance, view) + EPSILON)
    check(forward(view, x).y, expected, 5e-6, 1.0)


FIRST = [0.0, -1e4, 1e5]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", FIRST)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("masked", [False, True])
def test_a_few_first_values_unlike_the_rest_do_not_spoil_the_variance(layout: str, first: float, masked: bool) -> None:
    # They are all that sums are measured from at first. The rest is one number, so that nothing is rounded at random.
    view = LAYOUTS[layout]
    values = np.full((view.rows, view.features, view.inner), 1.1e4, np.float32)
    group = np.arange(view.rows) // view.span % view.groups
    for g in range(view.groups):
        values[np.flatnonzero(group == g)[: 1 if view.inner > 64 else 8], :, :64] = first
    x = values.reshape(-1)
    expected, spread = measured(x, view)
    mean, variance = np.empty(view.statistics), np.empty(view.statistics)
    mask = np.ones(view.rows * view.inner, bool) if masked else None
    kernel(view, x.dtype).moments(x=x, mean=mean, variance=variance, mask=mask)
    np.testing.assert_allclose(mean, expected, rtol=1e-7)
    np.testing.assert_allclose(variance, spread, rtol=4e-5)


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
    others = healthy.reshape(-1) if view.grouped_parameters else healthy[group]

    before, after = forward(view, x), forward(view, spoilt)
    assert same([moment[healthy] for moment in before[1:3]], [moment[healthy] for moment in after[1:3]])
    assert not np.isfinite(after.variance[group, feature])
    assert same([before.y[untouched.reshape(-1)]], [after.y[untouched.reshape(-1)]])
    sound, hurt = backward(view, x, dy, before), backward(view, spoilt, dy, after)
    assert same([sound.dx[untouched.reshape(-1)]], [hurt.dx[untouched.reshape(-1)]])
    assert same([gradient[others] for gradient in sound[1:]], [gradient[others] for gradient in hurt[1:]])
